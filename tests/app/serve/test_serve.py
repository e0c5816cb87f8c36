"""`skipkernels serve`: the REST endpoint, its limits, the page, and the command."""

from __future__ import annotations

import html
import itertools
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.serve.output import NONE
from tests.app.data.pictures import encoded
from tests.app.report.parsed import Page
from tests.app.runs import fails

pytest.importorskip("starlette", reason="serve needs the extra web")
import uvicorn  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from skipkernels.app.serve import web as module  # noqa: E402
from skipkernels.app.serve.web import Service, make_app  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def limits():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"IMAGE_BYTES": 50_000, "PIXELS": 10_000, "IMAGES": 3}.items():
            patch.setattr(module, name, value)
        yield


def client(classifier, **options) -> TestClient:
    service = Service(classifier, "photos", **options)
    return TestClient(make_app(service, ["127.0.0.1"]), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def web(classifier) -> TestClient:
    return client(classifier)


@pytest.fixture(scope="module")
def pictures(run) -> list[Image.Image]:
    return [run.task.tests[0].images[number][0] for number in range(3)]


def test_form_and_bytes_give_the_predictions_of_the_classifier(web, classifier, pictures):
    expected = classifier.predict(pictures, top=5)
    answer = web.post("/predict", files=[("x", (f"{n}.png", encoded(image))) for n, image in enumerate(pictures)])
    found = answer.json()["images"]
    assert answer.status_code == 200 and [item["name"] for item in found] == ["0.png", "1.png", "2.png"]
    for item, labels, row in zip(found, expected.labels, expected.probabilities.tolist(), strict=True):
        assert [each["label"] for each in item["predictions"]] == labels
        assert [each["probability"] for each in item["predictions"]] == pytest.approx(row, abs=1e-5)
    (raw,) = web.post("/predict", content=encoded(pictures[0])).json()["images"]
    assert raw["name"] == "image" and raw["predictions"][0]["label"] == expected.labels[0][0]


def test_threshold(classifier, pictures):
    found = client(classifier, threshold=1.0, top=2).post("/predict", content=encoded(pictures[0])).json()["images"][0]
    assert found["predictions"][0] == {"label": NONE, "probability": None} and len(found["predictions"]) == 2


def test_one_bad_image_does_not_stop_the_others(web, pictures):
    files = [("x", ("a.png", b"no image")), ("x", ("b.png", encoded(pictures[0])))]
    answer = web.post("/predict", files=files)
    bad, good = answer.json()["images"]
    assert answer.status_code == 200 and bad["error"].startswith("a.png: can't be read as an image (not JPEG")
    assert bad.keys() == {"name", "error"} and len(good["predictions"]) == 5


BLACK = encoded(Image.new("RGB", (40, 40)))


@pytest.mark.parametrize(
    ("request_options", "status", "message"),
    [
        ({"content": b"no image"}, 415, "image: can't be read as an image (not JPEG"),
        ({"content": BLACK[:60]}, 400, "image: can't be read as an image"),
        ({"content": encoded(Image.new("1", (101, 100)))}, 413, "image: must have at most 10,000 pixels"),
        ({"content": encoded(Image.new("1", (16_000, 16_000)))}, 413, "image: must have at most 10,000 pixels"),
        ({"content": bytes(50_001)}, 413, "the request must have at most 50.0 kB"),
        ({"content": iter([BLACK])}, 411, "the request must have its length"),
        ({"files": [("x", ("a", bytes(50_001)))]}, 413, "a: must have at most 50.0 kB; got 50.0 kB"),
        ({"files": [("x", ("a", bytes(300_000)))]}, 413, "the request must have at most 215.5 kB"),
        ({"files": [("x", ("a", BLACK))] * 4}, 400, "Too many files. Maximum number of files is 3."),
        ({"content": b""}, 400, "the request has no image"),
        ({"data": {"image": "a"}, "files": [("x", ("", b""))]}, 400, "the request has no image"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "Missing boundary in multipart."),
    ],
)
def test_refused_requests(web, request_options, status, message):
    answer = web.post("/predict", **request_options)
    assert answer.status_code == status and answer.json()["error"].startswith(message), answer.text
    assert "\n" not in answer.json()["error"]


def test_length_in_superscript_digits_is_refused(classifier):
    request = Request({"type": "http", "headers": [(b"content-length", "²".encode("latin-1"))]})
    with pytest.raises(HTTPException, match="^411"):
        Service(classifier, "photos")._check_length(request)


def test_one_request_at_a_time_is_classified(classifier, monkeypatch):
    running, most = [], []

    def answer(self, uploads):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return 200, {}

    monkeypatch.setattr(Service, "_answer", answer)
    with client(classifier) as web, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: web.post("/predict", content=b"x"), range(3)))
    assert most == [1, 1, 1]


@pytest.mark.parametrize("path", ["/classes", "/health", "/predict"])
def test_requests_of_pages_of_other_sites(web, path):
    """A link is followed; so are requests of the page itself, and an address that the user types ("none")."""
    method = "POST" if path == "/predict" else "GET"
    for site, mode in itertools.product(("cross-site", "same-origin", "none"), ("no-cors", "cors", "navigate")):
        refused = site == "cross-site" and (mode != "navigate" or method == "POST")
        answer = web.request(method, path, headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}, content=BLACK)
        assert answer.status_code == (403 if refused else 200) and (not refused or list(answer.json()) == ["error"])
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_a_bug_is_one_line(classifier, monkeypatch):
    monkeypatch.setattr(sk.Classifier, "predict", lambda *_, **options: 1 / 0)
    answer = client(classifier).post("/predict", content=BLACK)
    assert (answer.status_code, list(answer.json())) == (500, ["error"])


def test_other_routes(web, run):
    assert web.get("/classes").json() == {"classes": run.classes, "calibrated": False, "threshold": None}
    assert web.get("/health").json() == {"status": "ok", "version": sk.__version__}
    for path in ("/model.safetensors", "/classes/../config.yaml", "/%2e%2e/config.yaml"):
        assert (web.get(path).status_code, web.get(path).json()) == (404, {"error": "Not Found"})
    assert web.get("/predict").status_code == 405
    assert web.get("/health", headers={"Host": "example.com"}).status_code == 400  # DNS rebinding


def listed(page: Page) -> list[str]:
    """Classes on the page."""
    return [item.text for item in page.root.find(".//ul[@class='classes']")]


def test_page(web, run):
    """It names its classes, and loads nothing: the one address is that of the command."""
    text = web.get("/").text
    page = Page(text)
    assert page.root.find(".//meta[@http-equiv]").get("content").startswith("default-src 'none'")
    assert html.unescape(text).count("://") == page.text.count("http://127.0.0.1/predict") == 1
    assert listed(page) == run.classes
    hostile = sk.Classifier.load(run.folder, device="cpu", classes=["<script>", "b"])
    assert listed(Page(client(hostile).get("/").text)) == ["<script>", "b"]


def test_port_in_use(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert fails(["serve", run.folder, "--port", port], capsys) == (
            f"error --port: can't listen at 127.0.0.1, port {port} (Address already in use). Choose another port."
        )


def test_missing_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serve needs uvicorn: pip install 'skipkernels[web]'." in fails(["serve", run.folder], capsys)


@pytest.fixture
def loaded(classifier, monkeypatch) -> None:
    """The classifier is not loaded again."""
    monkeypatch.setattr(sk.Classifier, "load", lambda *_, **options: classifier)


def test_server_in_the_network_says_so(run, loaded, capsys, monkeypatch):
    def stopped(self, sockets):
        assert self.config.limit_concurrency == 100
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", stopped)
    options = ["serve", str(run.folder), "--device", "cpu", "--port", "0"]
    assert main([*options, "--host", "0.0.0.0"]) == 130
    printed = capsys.readouterr()
    assert "note: everyone in the network of this machine" in printed.err
    assert main(options) == 130
    printed = capsys.readouterr()
    assert "everyone" not in printed.err and "is served at http://127.0.0.1:" in printed.out


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def served(run, loaded, capsys, monkeypatch):
    """Function that serves a request over the network, calls `then`, and returns exit code, errors and answer."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, in a process in the background
    answers, serve = [], uvicorn.Server.run

    def request(port: int, then: Callable[[], None]) -> None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/predict", BLACK, timeout=30) as answer:
                answers.append(answer.read())
        except urllib.error.HTTPError as error:
            answers.append(error.read())
        then()

    def command(then: Callable[[], None] = lambda: None) -> tuple[int, str, bytes]:
        def serve_request(self, sockets):
            thread = threading.Thread(target=request, args=(sockets[0].getsockname()[1], then))
            thread.start()  # its connection waits until the server accepts it
            try:
                serve(self, sockets)
            finally:
                thread.join()

        monkeypatch.setattr(uvicorn.Server, "run", serve_request)
        code = main(["serve", str(run.folder), "--port", "0", "--device", "cpu"])
        return code, capsys.readouterr().err, answers[0]

    yield command
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_server(served):
    code, error, answer = served(then=interrupt)
    assert (code, error) == (130, "interrupted\n") and b"predictions" in answer


def test_ctrl_c_in_a_request_that_takes_longer_than_the_server_waits(served, monkeypatch):
    answer_of = Service._answer

    def answer(self, uploads):
        interrupt()
        time.sleep(3)
        return answer_of(self, uploads)

    monkeypatch.setattr(Service, "_answer", answer)
    code, error, answer = served()
    assert code == 130 and error.endswith("interrupted\n") and b"the server was stopped" in answer

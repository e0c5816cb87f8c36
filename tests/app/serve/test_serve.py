"""`skipkernels serve`: the REST endpoint, its limits, the page, and the command."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import io
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.data import decoder
from skipkernels.app.serve.embedded_images import embed_images, find_training_images
from skipkernels.app.serve.output import NONE
from tests.app.data.pictures import slow_picture
from tests.app.runs import fails

pytest.importorskip("starlette", reason="serve needs the extra web")
import uvicorn  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from skipkernels.app.serve.connections import LimitedProtocol  # noqa: E402
from skipkernels.app.serve.web import Limits, Page, Service, make_app  # noqa: E402

LIMITS = Limits(image_bytes=50_000, pixels=10_000, images=3, rate=1000)


@pytest.fixture(scope="module")
def classifier(run) -> sk.Classifier:
    return sk.Classifier.load(run.folder, device="cpu")


@pytest.fixture(scope="module")
def training(run, classifier):
    return embed_images(classifier, *find_training_images(run.folder), lambda count: None)


def client(classifier, limits: Limits = LIMITS, **options) -> TestClient:
    service = Service(classifier, Page("photos", "calibrated", "None."), limits=limits, **options)
    return TestClient(make_app(service, ["127.0.0.1"]), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def web(classifier, training) -> TestClient:
    return client(classifier, training=training, nearest=3)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures(run) -> list[Image.Image]:
    return [run.task.tests[0].images[number][0] for number in range(3)]


def test_form_and_bytes_give_the_predictions_of_the_classifier(web, classifier, pictures):
    expected = classifier.predict(pictures, top=5)
    answer = web.post("/predict", files=[("x", (f"{n}.png", png(image))) for n, image in enumerate(pictures)])
    found = answer.json()["images"]
    assert answer.status_code == 200 and [item["name"] for item in found] == ["0.png", "1.png", "2.png"]
    for item, labels, row in zip(found, expected.labels, expected.probabilities.tolist(), strict=True):
        assert [each["label"] for each in item["predictions"]] == labels
        assert [each["probability"] for each in item["predictions"]] == pytest.approx(row, abs=1e-5)
    (raw,) = web.post("/predict", content=png(pictures[0])).json()["images"]
    assert raw["name"] == "image" and raw["predictions"][0]["label"] == expected.labels[0][0]


def test_nearest_training_images(web, training, classifier, run):
    """The nearest to a training image is itself, and its thumbnail is served."""
    names = list(run.task.train.names)
    assert training.names == names and training.labels.tolist() == list(run.task.train.labels)
    image = run.task.train[5][0]
    nearest = web.post("/predict", content=png(image)).json()["images"][0]["nearest"]
    assert len(nearest) == 3 and nearest[0]["name"] == names[5] and nearest[0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert nearest[0]["label"] == run.classes[run.task.train.labels[5]]
    expected = classifier.embed(classifier.transform(image)[None]) @ training.embeddings.T
    assert [each["cosine"] for each in nearest] == pytest.approx(
        expected.sort(descending=True).values[0, :3].tolist(), abs=1e-3
    )
    shown = web.get("/" + nearest[0]["thumbnail"])
    assert shown.headers["content-type"] == "image/png" and Image.open(io.BytesIO(shown.content)).size == image.size
    for number in (len(names), -1, "9" * 5000, "a"):
        assert web.get(f"/training/{number}").json() == {"error": "no such training image."}


def test_threshold(classifier, pictures):
    found = client(classifier, threshold=1.0, top=2).post("/predict", content=png(pictures[0])).json()["images"][0]
    assert found["predictions"][0] == {"label": NONE, "probability": None} and len(found["predictions"]) == 2
    assert "nearest" not in found


def test_one_bad_image_does_not_stop_the_others(web, pictures):
    files = [("x", ("a.png", b"no image")), ("x", ("b.png", png(pictures[0])))]
    answer = web.post("/predict", files=files)
    bad, good = answer.json()["images"]
    assert answer.status_code == 200 and bad["error"].startswith("a.png: can't be read as an image (not JPEG")
    assert bad.keys() == {"name", "error"} and len(good["predictions"]) == 5


BLACK = png(Image.new("RGB", (40, 40)))


@pytest.mark.parametrize(
    ("request_options", "status", "message"),
    [
        ({"content": b"no image"}, 415, "image: can't be read as an image (not JPEG"),
        ({"content": BLACK[:60]}, 400, "image: can't be read as an image"),
        ({"content": png(Image.new("1", (101, 100)))}, 413, "image: must have at most 10,000 pixels"),
        ({"content": png(Image.new("1", (16_000, 16_000)))}, 413, "image: must have at most 10,000 pixels"),
        ({"content": bytes(50_001)}, 413, "the request must have at most 50.0 kB"),
        ({"content": iter([bytes(30_000)] * 2)}, 413, "the request must have at most 50.0 kB"),
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
    assert web.get("/health").json()["pending"] == 0


def test_rate(classifier):
    limited = client(classifier, Limits(rate=2))
    answers = [limited.post("/predict", content=BLACK) for _ in range(3)]
    if answers[2].status_code == 200:  # a new minute of the clock
        answers = [limited.post("/predict", content=BLACK) for _ in range(3)]
    assert answers[-1].status_code == 429 and 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert answers[-1].json()["error"].startswith("more than 2 requests in a minute; try again in ")
    assert limited.get("/health").status_code == 200


def test_queue(classifier, monkeypatch):
    """With two requests pending a third is refused; images are classified for one request at a time."""
    entered, release, running = threading.Event(), threading.Event(), []
    service = Service(classifier, Page("", "", ""), limits=Limits(pending=2))

    def classify(self, uploads, decoded):
        running.append(1)
        assert len(running) == 1
        entered.set()
        assert release.wait(30)
        running.pop()
        return 200, {}

    monkeypatch.setattr(Service, "_classify", classify)
    with TestClient(make_app(service)) as web:
        threads = [threading.Thread(target=web.post, args=("/predict",), kwargs={"content": b"x"}) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert entered.wait(30)
        while web.get("/health").json()["pending"] < 2:
            pass
        answer = web.post("/predict", content=b"x")
        release.set()
        for thread in threads:
            thread.join()
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert web.get("/health").json()["pending"] == 0


def test_one_forward_pass(web, run, classifier, monkeypatch):
    """Predictions and nearest training images need the same embeddings."""
    method = classifier._run.method
    passes, embed = [], method.embed
    monkeypatch.setattr(method, "embed", lambda inputs: passes.append(len(inputs)) or embed(inputs))
    assert web.post("/predict", content=BLACK).json()["images"][0]["nearest"] and passes == [1]


def test_thumbnail_of_an_image(web):
    """The page shows it where the browser does not know the format."""
    pytest.importorskip("pillow_heif", reason="HEIC needs the extra heif")
    file = io.BytesIO()
    from_pillow = sys.modules["pillow_heif"].from_pillow
    from_pillow(Image.new("RGB", (100, 80), "red")).save(file)
    (found,) = web.post("/predict?thumbnail", content=file.getvalue()).json()["images"]
    head, _, data = found["thumbnail"].partition(",")
    assert head == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (100, 80)
    assert "thumbnail" not in web.post("/predict", content=BLACK).json()["images"][0]


def test_limit_of_the_time_to_decode(classifier):
    limits = Limits(decoding=0.3)
    files = [("x", ("slow", slow_picture())), ("x", ("black", BLACK))]
    answer = client(classifier, limits).post("/predict", files=files)
    slow, black = (each["error"] for each in answer.json()["images"])
    assert answer.status_code == 400 and slow.startswith("slow: can't be read as an image (decoding takes more than 0.")
    assert black == "black: images of a request must take at most 0.3 s to decode."
    assert client(classifier, limits).post("/predict", content=BLACK).status_code == 200


@pytest.mark.parametrize("path", ["/training/0", "/classes", "/health", "/predict"])
def test_requests_of_pages_of_other_sites(web, path):
    method = "POST" if path == "/predict" else "GET"
    for mode in ("no-cors", "cors", *(["navigate"] if method == "POST" else [])):
        answer = web.request(method, path, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode})
        assert (answer.status_code, list(answer.json())) == (403, ["error"])
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    for site in ("same-origin", "none"):  # the page itself, and an address that the user types
        answer = web.request(method, path, headers={"Sec-Fetch-Site": site}, content=BLACK)
        assert (answer.status_code, answer.headers["Cross-Origin-Resource-Policy"]) == (200, "same-origin")


def test_link_of_another_site(web):
    assert web.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status_code == 200


def test_slow_request_is_refused(classifier, monkeypatch):
    async def forever(self, request):
        await asyncio.sleep(60)

    monkeypatch.setattr(Service, "_uploads", forever)
    answer = client(classifier, Limits(seconds=0.01)).post("/predict", content=b"x")
    assert (answer.status_code, answer.json()["error"]) == (408, "the request took more than 0.01 s to send.")


def test_a_bug_is_one_line(classifier, monkeypatch):
    monkeypatch.setattr(sk.Classifier, "predict", lambda *_, **options: 1 / 0)
    answer = client(classifier).post("/predict", content=BLACK)
    assert (answer.status_code, list(answer.json())) == (500, ["error"])


def test_other_routes(web, run):
    assert web.get("/classes").json() == {"classes": run.classes, "calibrated": False, "threshold": None}
    assert web.get("/health").json() == {"status": "ok", "version": sk.__version__, "pending": 0}
    for path in ("/model.safetensors", "/training/../config.yaml", "/%2e%2e/config.yaml"):
        assert (web.get(path).status_code, web.get(path).json()) == (404, {"error": "Not Found"})
    assert web.get("/predict").status_code == 405
    assert web.get("/health", headers={"Host": "example.com"}).status_code == 400  # DNS rebinding


def test_page(web, run):
    page = html.unescape(web.get("/").text)
    assert "default-src 'none'" in page and page.count("://") == page.count("http://127.0.0.1/predict") == 1
    assert all(f"<li>{name}</li>" in page for name in run.classes)
    hostile = sk.Classifier.load(run.folder, device="cpu", classes=["<script>", "b"])
    assert "<li>&lt;script&gt;</li>" in client(hostile).get("/").text


def test_unreadable_training_images_are_left_out(classifier, run):
    images, classes = find_training_images(run.folder)
    images.dataset = [*images.dataset]
    images.dataset[images.indices[1]] = (Image.new("F", (8, 8)), images.labels[1])
    found = embed_images(classifier, images, classes, lambda count: None)
    assert list(found.unreadable) == [images.names[1]] and found.names == [images.names[0], *images.names[2:]]
    assert torch.equal(found.labels, torch.tensor([images.labels[0], *images.labels[2:]]))


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


def test_server_in_the_network_shows_no_training_images(run, loaded, capsys, monkeypatch):
    def stopped(self, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", stopped)
    options = ["serve", str(run.folder), "--device", "cpu", "--port", "0"]
    assert main([*options, "--host", "0.0.0.0"]) == 130
    printed = capsys.readouterr()
    assert "note: everyone in the network of this machine" in printed.err and "training images" not in printed.err
    assert main(options) == 130
    printed = capsys.readouterr()
    assert "everyone" not in printed.err and "is served at http://127.0.0.1:" in printed.out
    assert "training images" in printed.err


@pytest.mark.parametrize("picture", [BLACK, slow_picture()], ids=["answered", "while an image is decoded"])
def test_ctrl_c_ends_the_server(run, loaded, capsys, monkeypatch, picture):
    """A request over the network to a real server, then SIGINT."""
    answers, original, seconds = [], uvicorn.Server.run, 30 if picture is BLACK else 1

    def used(self, sockets):
        def use() -> None:
            try:
                url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/predict"
                with urllib.request.urlopen(urllib.request.Request(url, picture), timeout=seconds) as answer:
                    answers.append(answer.read())
            except TimeoutError:
                answers.append(None)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=use)  # its connection waits until the server accepts it
        thread.start()
        try:
            original(self, sockets)
        finally:
            thread.join()

    monkeypatch.setattr(uvicorn.Server, "run", used)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored, in a process in the background
    code = main(["serve", str(run.folder), "--port", "0", "--nearest", "0", "--device", "cpu"])
    signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert code == 130 and error.endswith("interrupted\n") and not decoder._decoders
    if picture is BLACK:
        assert b"predictions" in answers[0] and error == "interrupted\n"
    else:
        assert answers == [None]


@contextlib.contextmanager
def serving(app) -> Iterator[tuple[str, int]]:
    """Serve at a free port in a thread; yield the address."""
    config = uvicorn.Config(app, http=LimitedProtocol, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


WHOLE = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [[], [WHOLE[:-2]], [WHOLE, WHOLE[:-2]], [WHOLE + WHOLE[:-2]]],
    ids=["nothing", "half", "half after a whole one", "half behind a whole one"],
)
def test_half_requests_are_closed(classifier, monkeypatch, sent):
    """Also if a byte comes from time to time, which ends uvicorn's own limit."""
    monkeypatch.setattr(LimitedProtocol, "seconds", 0.3)
    with serving(make_app(Service(classifier, Page("", "", "")))) as address:
        with socket.create_connection(address, timeout=30) as client:
            for part in sent:
                client.sendall(part)
                if part.startswith(WHOLE):
                    assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
            client.settimeout(0.05)
            deadline = time.monotonic() + 30
            while True:
                assert time.monotonic() < deadline
                try:
                    client.sendall(b"x" if sent else b"")
                    if client.recv(1 << 16) == b"":
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break


def test_limit_of_connections(classifier, monkeypatch):
    monkeypatch.setattr(LimitedProtocol, "most", 3)
    with serving(make_app(Service(classifier, Page("", "", "")))) as address, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(4)]
        with contextlib.suppress(ConnectionError):
            assert clients[3].recv(1) == b""
        for client in clients[:3]:
            client.sendall(WHOLE)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")

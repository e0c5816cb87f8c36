"""The page of `skipkernels serve` in Chromium, at the widths of a phone and a desktop.

Runs where the extra test-web is installed, and Chromium (or the program that CHROME names) and chromedriver are found.
"""

from __future__ import annotations

import os
import shutil
import threading

import pytest
from PIL import Image

from skipkernels.app.serve.output import NONE

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
uvicorn = pytest.importorskip("uvicorn", reason="serve needs the extra web")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from skipkernels.app.serve import web  # noqa: E402
from skipkernels.app.serve.web import Service, make_app  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROME = os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROME and DRIVER), reason="no chromium, or no chromedriver")


@pytest.fixture(scope="module")
def address(classifier) -> str:
    """A server with a threshold that some images reach."""
    service = Service(classifier, "photos", threshold=0.2)
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="warning", lifespan="off"))
    listener = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "IMAGE_BYTES", 30_000)
        patch.setattr(web, "PIXELS", 10_000)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def files(run, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    run.task.tests[0].images[0][0].save(folder / "good.png")
    data = (folder / "good.png").read_bytes()
    (folder / "broken.png").write_bytes(data[: len(data) // 2])
    (folder / "large.jpg").write_bytes(bytes(30_001))
    (folder / "text.txt").write_text("no image")
    Image.new("1", (101, 100)).save(folder / "pixels.png")
    return {path.name: str(path) for path in folder.iterdir()}


def choose(browser, paths: list[str]) -> None:
    """Choose files, and wait for the results of all."""
    browser.find_element(By.ID, "files").send_keys("\n".join(paths))
    WebDriverWait(browser, 60, 0.02).until(lambda _: not browser.find_elements(By.CSS_SELECTOR, "[aria-busy]"))


def texts(browser, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


@pytest.mark.parametrize("width", [400, 1280])
def test_page(address, browser, files, run, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(address)
    names = ["good.png", "broken.png", "large.jpg", "text.txt", "pixels.png"]
    choose(browser, [files[name] for name in names])
    assert texts(browser, ".file") == names and texts(browser, "#state") == ["5 images"]
    good, *bad = browser.find_elements(By.CSS_SELECTOR, ".result")
    assert all("failed" in card.get_attribute("class") for card in bad)
    reasons = ("can't be read as an image", "too large", "can't be read as an image (not", "must have at most 10,000")
    for reason, said in zip(reasons, texts(browser, ".failed .said"), strict=True):
        assert said.startswith(reason)
    assert len(texts(browser, ".bars li")) >= 4 and good.find_element(By.TAG_NAME, "h2").text in {*run.classes, NONE}
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["source"] != "network"]
    assert errors == []  # none of the policy either


def test_twelve_images_and_the_keyboard(address, browser, files):
    browser.get(address)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("id") == "files"
    assert browser.find_element(By.ID, "files").accessible_name == "Choose images or drop or paste them here"
    choose(browser, [files["good.png"]] * 12)
    assert len(texts(browser, ".result h2")) == 12 and "" not in texts(browser, ".result h2")
    browser.find_element(By.ID, "clear").send_keys(Keys.ENTER)
    assert not browser.find_elements(By.CSS_SELECTOR, ".result") and texts(browser, "#state") == [""]


def test_drop(address, browser):
    """A file that is dropped beside the zone is classified too, and the browser does not open it."""
    browser.get(address)
    browser.execute_script(
        "const data = new DataTransfer(); data.items.add(new File(['no image'], 'dropped.png'));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}))"
    )
    WebDriverWait(browser, 30, 0.02).until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".failed"))
    assert texts(browser, ".file") == ["dropped.png"] and browser.current_url == address

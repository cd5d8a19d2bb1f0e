"""The web demo in a browser: the command in a process, and a user in Chromium."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from kornia_tinyvit import save_checkpoint
from tests.helpers import PHOTOS
from tests.sam.test_model import lively

pytest.importorskip("gradio", reason="needs the extra demo")

pytestmark = pytest.mark.slow  # a process of the command and a browser

SECONDS = 60  # for anything on a busy machine
WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}

# Records every address outside of the machine that the process connects to.
WATCH = """
import os, sys

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print(arguments[1], file=open(os.environ["REACHED"], "a"))
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
        print(arguments[0], file=open(os.environ["REACHED"], "a"))

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def reached(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("web") / "reached.txt"


@pytest.fixture(scope="module")
def address(tmp_path_factory, reached):
    """URL of the running web demo with the embedded network and a small MobileSAM, behind an unreachable proxy."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "sitecustomize.py").write_text(WATCH)
    weights = save_checkpoint(lively(), folder / "sam.safetensors")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "kornia_tinyvit", "demo", "--web", "--port", "0", "--sam-weights", str(weights)]
    with subprocess.Popen(
        command,
        env=os.environ | proxies | {"PYTHONPATH": paths, "REACHED": str(reached), "TMPDIR": str(folder)},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        yield re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        process.terminate()
        process.wait(SECONDS)
    assert not list(folder.glob("kornia-tinyvit-*"))  # uploads are deleted


class Visit:
    """A user's page with its requests and errors."""

    def __init__(self, chromium, address, viewport=WIDE, color_scheme="light"):
        self.context = chromium.new_context(viewport=viewport, color_scheme=color_scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.wait("#labels", "cat")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def wait(self, place: str, text: str) -> None:
        self.page.locator(place).filter(has_text=text).first.wait_for()

    def wait_for_change(self, place: str, attribute: str, old: str) -> str:
        script = "([place, name, old]) => document.querySelector(place)?.[name] !== old"
        self.page.wait_for_function(script, arg=[place, attribute, old])
        return self.look(place, attribute)

    def look(self, place: str, attribute: str) -> str:
        return self.page.evaluate("([place, name]) => document.querySelector(place)?.[name]", [place, attribute])

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def upload(self, path: Path) -> None:
        if self.page.locator("#photo img").count():
            self.page.locator("#photo").get_by_label("Remove Image").click()
            self.page.locator("#photo img").wait_for(state="detached")
        self.page.locator("#photo input[type=file]").set_input_files(path)

    def wait_until_drawn(self, place: str) -> None:
        """Wait until a component has images and all of them are loaded."""
        script = """place => {
            const images = [...document.querySelectorAll(place + " img")];
            return images.length > 0 && images.every(each => each.naturalWidth > 0);
        }"""
        self.page.wait_for_function(script, arg=place)

    def wait_until_idle(self, place: str) -> None:
        """Wait until a component accepts clicks again: until then an overlay intercepts them."""
        script = """place => [...document.querySelectorAll(place + " [data-testid=status-tracker]")]
            .every(each => each.classList.contains("hide"))"""
        self.page.wait_for_function(script, arg=place)

    def overflows(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def test_visit(chromium, address, reached):
    """Upload, slider, clicks, everything, features: without requests to other hosts and without errors."""
    with Visit(chromium, address) as visit:
        visit.upload(PHOTOS / "horse.png")
        visit.wait("#labels", "horse")
        visit.page.locator("#saliency img").wait_for()
        visit.wait_until_drawn("#saliency")

        visit.open_tab("Augment")
        visit.page.locator("#scores tbody tr").first.wait_for()
        before, image = visit.look("#scores tbody", "innerText"), visit.look("#changed img", "src")
        visit.page.get_by_role("slider", name=re.compile("contrast")).fill("2.5")
        after = visit.wait_for_change("#scores tbody", "innerText", before)
        assert re.findall(r"\S+%", after) != re.findall(r"\S+%", before)
        visit.wait_for_change("#changed img", "src", image)
        visit.page.get_by_role("button", name="Reset", exact=True).click()
        visit.page.wait_for_function("old => document.querySelector('#scores tbody').innerText === old", arg=before)

        visit.open_tab("Segment")
        masks = visit.page.locator("#masks img")
        plain = visit.look("#masks img", "src")
        masks.click()
        visit.wait("#status", "The mask covers")
        one = visit.wait_for_change("#masks img", "src", plain)
        visit.wait_until_idle("#masks")
        visit.page.get_by_label("corner of a box").check()
        masks.click(position={"x": 20, "y": 20})
        visit.wait("#status", "Now click the opposite corner")
        visit.wait_for_change("#masks img", "src", one)
        visit.wait_until_idle("#masks")
        masks.click(position={"x": 200, "y": 150})
        visit.wait("#status", "The mask covers")
        visit.wait_until_drawn("#masks")
        visit.wait_until_idle("#masks")
        visit.page.get_by_label("8", exact=True).check()
        visit.page.locator("#everything").click()
        visit.page.locator("#status").filter(has_text=re.compile(r"Found \d+ masks? at 64 points\.")).wait_for()
        visit.page.get_by_role("button", name="Clear", exact=True).last.click()
        visit.wait("#status", "Click points on an object")

        visit.open_tab("Features")
        visit.page.get_by_text("stage 4: 160 channels").wait_for()
        visit.wait_until_drawn(".stage")
        assert [url for url in visit.requests if not url.startswith((address, "data:", "blob:"))] == []
        assert visit.errors == []
    assert not reached.exists(), reached.read_text()


def test_errors(chromium, address, tmp_path):
    """A text file, a decompression bomb and a large file show an error, and the page keeps working."""
    (tmp_path / "<b>notes.png").write_text("no image")
    Image.new("1", (8000, 6000)).save(tmp_path / "bomb.png")
    (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
    with Visit(chromium, address) as visit:
        for name, message in (
            ("<b>notes.png", "notes.png is not an image that can be read"),
            ("bomb.png", "bomb.png is not an image that can be read: it has 8000x6000 pixels"),
            ("large.png", "maximum allowed size of 20"),
        ):
            visit.upload(tmp_path / name)
            visit.page.get_by_text(message).first.wait_for()
            # The message is shown before the component is cleared, and until then a click cannot remove the image.
            visit.page.locator("#photo img").wait_for(state="detached")
        visit.page.locator("#examples img").last.click()
        visit.page.locator("#labels").filter(has_text="%").wait_for()
        visit.wait_until_drawn("#photo")


def test_rejects_files_of_the_server(address, tmp_path):
    """A handmade request for an image that was not uploaded."""
    Image.new("RGB", (50, 50)).save(tmp_path / "private.png")
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    number = next(each["id"] for each in config["dependencies"] if each["api_name"] == "_open")
    file = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file], "fn_index": number, "session_hash": "hand", "event_data": None}
    request = urllib.request.Request(
        f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=hand", timeout=SECONDS) as stream:
        done = next(line for line in map(bytes.decode, stream) if "process_completed" in line)
    assert '"success":false' in done.replace(" ", "")
    assert "was not uploaded by a user" in done


def test_phone(chromium, address):
    """A small screen in dark mode: all tabs are visible, and nothing overflows."""
    with Visit(chromium, address, PHONE, "dark") as visit:
        for tab in ("Classify", "Augment", "Segment", "Features"):
            visit.open_tab(tab)
            assert not visit.overflows()
        assert visit.errors == []

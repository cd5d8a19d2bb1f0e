"""The documentation in a browser: layout of every page on wide and phone screens, light and dark; internal links."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from filelock import FileLock  # torch brings it

ROOT = Path(__file__).parents[1]
SCREENS = {"wide": {"width": 1400, "height": 900}, "phone": {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")

#: JavaScript that returns layout faults: horizontal scrolling of the page, content beyond its edge, images that fail to
#: load. Code and tables may be wider inside an element that scrolls, except furo's main column.
INSPECT = """async () => {
    const width = document.documentElement.clientWidth, faults = [];
    if (document.documentElement.scrollWidth > width)
        faults.push(`is ${document.documentElement.scrollWidth} wide`);
    const scrolls = element => element.localName !== "article" &&
        (["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
    for (const element of document.querySelectorAll("article :not(span)"))
        if (element.getBoundingClientRect().right > width + 1 && !scrolls(element.parentElement)) {
            faults.push(`<${element.localName} class="${element.className}"> overflows`);
            break;
        }
    for (const image of document.images) {
        await image.decode().catch(() => {});
        if (!image.naturalWidth) faults.push(`has no image ${image.getAttribute("src")}`);
    }
    const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number);
    return {faults, brightness: (red + green + blue) / 3 / 255};
}"""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The documentation, built once for all worker processes; warnings are errors."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{folder}.lock"):
        if not (folder / "index.html").exists():
            command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
            doctrees = folder.with_name("doctrees")
            subprocess.run([*command, "-d", doctrees, ROOT / "docs", folder], check=True)
    return folder


class Parser(HTMLParser):
    """The anchors and links of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.targets.add(value)


def dead_links(folder: Path) -> list[str]:
    """Return links between pages of a folder to missing files or anchors."""
    pages = {page.relative_to(folder).as_posix(): Parser(page) for page in sorted(folder.rglob("*.html"))}
    faults = []
    for name, page in pages.items():
        for target in sorted(page.targets):
            link = urlsplit(urljoin(name, target))
            path = unquote(link.path)
            if link.scheme or link.netloc:
                continue
            if not (folder / path).is_file():
                faults.append(f"{name}: {target} does not exist")
            elif link.fragment and path in pages and unquote(link.fragment) not in pages[path].anchors:
                faults.append(f"{name}: {target} has no such anchor")
    return faults


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on localhost and return the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def listen(page: Any, address: str, faults: list[str]) -> None:
    """Collect errors, failed requests and requests to other hosts of a page."""
    page.on("pageerror", lambda error: faults.append(f"raises {error}"))
    page.on("console", lambda message: faults.append(f"logs {message.text}") if message.type == "error" else None)
    page.on("requestfailed", lambda request: faults.append(f"fails to load {request.url}"))
    page.on(
        "response",
        lambda response: faults.append(f"got {response.status} for {response.url}") if response.status >= 400 else None,
    )
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith((address, "data:")) else faults.append(f"requests {request.url}")
        ),
    )


def inspect(page: Any) -> list[str]:
    """Return the layout faults of an open page on each screen, light and dark."""
    faults = []
    for screen, size in SCREENS.items():
        page.set_viewport_size(size)
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            result = page.evaluate(INSPECT)
            if (result["brightness"] > 0.5) != (scheme == "light"):
                result["faults"].append(f"has a background of brightness {result['brightness']:.2f}")
            faults += [f"{screen}, {scheme}: {fault}" for fault in result["faults"]]
    return faults


def pages_to_inspect(folder: Path) -> list[Path]:
    """Return all pages; of the source listings, which have the same layout, only the longest."""
    pages = sorted(folder.rglob("*.html"))
    listings = sorted((page for page in pages if "_modules" in page.parts), key=lambda page: page.stat().st_size)
    return [page for page in pages if page not in listings[:-1]]


def page_faults(browser: Any, folder: Path) -> list[str]:
    """Return the faults of all pages of a folder in a browser."""
    faults: list[str] = []
    with served(folder) as address, browser.new_context() as context:
        page = context.new_page()
        events: list[str] = []
        listen(page, address, events)
        for path in pages_to_inspect(folder):
            name = path.relative_to(folder).as_posix()
            page.goto(address + name)
            faults += [f"{name}: {fault}" for fault in (*inspect(page), *events)]
            events.clear()
    return faults


@pytest.mark.slow
def test_internal_links(site):
    faults = dead_links(site)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_layout_of_pages(chromium, site):
    faults = page_faults(chromium, site)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_search(chromium, site):
    with served(site) as address, chromium.new_context() as context:
        page = context.new_page()
        page.goto(address)
        page.fill(".sidebar-search", "activation checkpointing")
        page.press(".sidebar-search", "Enter")
        page.wait_for_selector("#search-results li a")
        assert "models/tiny_vit.html" in " ".join(
            link.get_attribute("href") for link in page.query_selector_all("#search-results li a")
        )


VALID = """<html><head><link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">
<style>:root { color-scheme: light dark } @media (prefers-color-scheme: light) { body { background: #fff } }
@media (prefers-color-scheme: dark) { body { background: #000 } }</style></head>
<body><article id="top"><a href="#top">up</a><a href="page.html?x=1#top">here</a><a href="https://kornia.org">out</a>
<div style="overflow-x: auto"><pre style="width: 2000px">wide, scrolls</pre></div>FAULT</article></body></html>"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message", "count"),
    [
        ("", "", 0),
        ('<img src="none.png">', "has no image none.png", 6),  # in four views, the response, the console
        ('<div style="width: 600px">wide</div>', "phone, light: is 6", 4),
        ('</article><div style="overflow: auto"><article><p style="width: 600px">in its column', "overflows", 2),
        ('<div style="overflow: hidden"><p style="width: 600px">cut</p></div>', "overflows", 2),
        ("<script>console.error('a message')</script>", "logs a message", 1),
        ("<script>undefined.name</script>", "raises Cannot read", 1),
        ('<script src="http://127.0.0.1:9/script.js"></script>', "requests http://127.0.0.1:9/script.js", 3),
        ("<style>body { background: #fff !important }</style>", "dark: has a background of brightness 1.00", 2),
    ],
)
def test_finds_faults(chromium, tmp_path, fault, message, count):
    (tmp_path / "page.html").write_text(VALID.replace("FAULT", fault), encoding="utf-8")
    faults = page_faults(chromium, tmp_path)
    assert len(faults) == count, faults
    assert not message or any(message in each for each in faults)


def test_finds_dead_links(tmp_path):
    links = '<a href="none.html"></a><a href="#none"></a><a href="sub/page.html#none"></a><img src="none.png">'
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.html").write_text('<a href="../page.html#top">there</a>', encoding="utf-8")
    (tmp_path / "page.html").write_text(VALID.replace("FAULT", links), encoding="utf-8")
    assert [fault.split()[1] for fault in dead_links(tmp_path)] == [
        "#none",
        "none.html",
        "none.png",
        "sub/page.html#none",
    ]

"""Take the screenshot of `kornia-tinyvit demo --web` for the documentation, `docs/_static/web.png`.

    python docs/record_web.py

It needs the extra `demo`, playwright, and an installed Chromium; no network connection.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGE = Path(__file__).resolve().parent / "_static" / "web.png"
VIEWPORT = {"width": 1360, "height": 840}
COMMAND = [sys.executable, "-m", "kornia_tinyvit", "demo", "--web", "--port", "0"]


def take_screenshot(page: Page) -> bytes:
    """Rotate and desaturate the cat, and wait until the page shows the result."""
    page.locator("#labels").filter(has_text="cat").wait_for()
    page.get_by_role("tab", name="Augment").click()
    scores = "#scores tbody"
    page.locator(scores).wait_for()
    for slider, value in (("saturation", "0.2"), ("rotation", "24")):
        before = page.locator(scores).inner_text()
        page.get_by_role("slider", name=re.compile(slider)).fill(value)
        page.wait_for_function(f"old => document.querySelector('{scores}').innerText !== old", arg=before)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until the images are loaded
    return page.screenshot()


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - the command above
        address = re.findall(r"http://\S+", process.stdout.readline())[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=VIEWPORT)
            page.goto(address)
            screenshot = take_screenshot(page)
            browser.close()
        process.terminate()
    # 256 colors take a quarter of the bytes.
    Image.open(io.BytesIO(screenshot)).convert("RGB").quantize(256).save(IMAGE, optimize=True)


if __name__ == "__main__":
    main()

"""Takes the pictures of the live page beside this file, with Debian's chromium, of a job that runs now:

python docs/images/screenshots.py http://127.0.0.1:9090/
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = {
    "page-light.png": ({"width": 1280, "height": 900}, "light"),
    "page-dark.png": ({"width": 1280, "height": 900}, "dark"),
    "page-phone.png": ({"width": 390, "height": 844}, "light"),
}


def take(url: str) -> None:
    """Write all of them."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (viewport, scheme) in PICTURES.items():
            page = browser.new_page(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(url, wait_until="domcontentloaded")
            page.wait_for_selector("#rounds tr:nth-child(3)")
            page.wait_for_timeout(1500)
            page.screenshot(path=Path(__file__).parent / name, full_page=viewport["width"] > 400)
        browser.close()


if __name__ == "__main__":
    take(sys.argv[1])

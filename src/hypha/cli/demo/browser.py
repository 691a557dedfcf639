"""Opens a page in the user's browser, and never one that would take the terminal."""

from __future__ import annotations

import webbrowser
from functools import partial

import trio

from hypha.cli.demo.showing import Show


async def open_browser(url: str, show: Show) -> None:
    """Open ``url``; what prevents that is shown, and nothing worse comes of it."""
    try:
        opened = await trio.to_thread.run_sync(partial(_open, url), abandon_on_cancel=True)
    except (webbrowser.Error, OSError):
        opened = False
    if not opened:
        show.line(f"No browser with a window was found here; open {url} yourself.")


def _open(url: str) -> bool:
    browser = webbrowser.get()
    text = isinstance(browser, webbrowser.GenericBrowser)
    if text and not isinstance(browser, webbrowser.BackgroundBrowser):
        return False
    return browser.open(url)

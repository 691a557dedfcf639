"""``hypha demo --open``: a browser with a window, or a sentence."""

from __future__ import annotations

import io
import sys
import webbrowser
from pathlib import Path

import pytest
from rich.console import Console
from tests.support.polling import until

from hypha.cli.demo import open_browser

URL = "http://127.0.0.1:9/"


async def shown(monkeypatch: pytest.MonkeyPatch, browser: webbrowser.BaseBrowser | None) -> str:
    def get() -> webbrowser.BaseBrowser:
        if browser is None:
            raise webbrowser.Error("could not locate runnable browser")
        return browser

    monkeypatch.setattr(webbrowser, "get", get)
    console = Console(file=io.StringIO())
    await open_browser(URL, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


# it goes on by itself, and nobody waits for it
@pytest.mark.filterwarnings("ignore:subprocess", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_browser_with_a_window_opens_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text(sys.argv[1])"
    command = [sys.executable, "-c", code, "%s", str(tmp_path / "opened")]
    assert await shown(monkeypatch, webbrowser.BackgroundBrowser(command)) == ""
    await until(lambda: (tmp_path / "opened").exists() and (tmp_path / "opened").read_text() == URL, 30)


@pytest.mark.parametrize("browser", [None, webbrowser.GenericBrowser("lynx")])
async def test_none_that_takes_the_terminal_is_started(
    monkeypatch: pytest.MonkeyPatch, browser: webbrowser.BaseBrowser | None
) -> None:
    assert f"open {URL} yourself" in await shown(monkeypatch, browser)

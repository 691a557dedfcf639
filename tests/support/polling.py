"""Waiting in tests: for a condition, never for a while."""

from __future__ import annotations

from collections.abc import Callable

import trio


async def until(
    holds: Callable[[], bool], timeout_s: float = 20.0, explain: Callable[[], str] = lambda: ""
) -> None:
    """Return once ``holds``; AssertionError with ``explain()`` when that takes longer than ``timeout_s``."""
    with trio.move_on_after(timeout_s):
        while not holds():
            await trio.sleep(0.02)
        return
    raise AssertionError(f"still not so after {timeout_s:g} s\n{explain()}")

"""Observations: finding things out, each within its own time; what fails is noted, and holds up nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from hypha.cli.doctor.gathered import Unknown
from hypha.errors import HyphaError
from hypha.naming import cleaned
from hypha.runtime import in_thread

T = TypeVar("T")
Find = Callable[[], Awaitable[Any]]
#: of a sentence that a peer has written
_MOST = 500


def readable(text: str) -> str:
    """``text``, which a peer may have written, in one line without anything that controls a terminal."""
    return cleaned(text, _MOST)


async def at_once(*finds: Find) -> list[Any]:
    """What each of ``finds`` gives; all run at the same time."""
    found: list[Any] = [None] * len(finds)

    async def run(number: int) -> None:
        found[number] = await finds[number]()

    async with trio.open_nursery() as nursery:
        for number in range(len(finds)):
            nursery.start_soon(run, number)
    return found


#: finds nothing, where there is nothing to look at
nothing: Find = trio.lowlevel.checkpoint


class Gathering:
    """What could not be found out, so far."""

    def __init__(self) -> None:
        self.unknown: list[Unknown] = []

    async def within(self, limit_s: float, what: str, find: Callable[[], Awaitable[T]]) -> T | None:
        """What ``find`` gives, or None where it takes longer or cannot be; that is noted."""
        try:
            with trio.fail_after(limit_s):
                return await find()
        except trio.TooSlowError:
            self.note(what, f"it took longer than {limit_s:g} s")
        except (HyphaError, OSError) as exc:
            self.note(what, str(exc))
        return None

    async def in_thread(self, limit_s: float, what: str, call: Callable[..., T], *arguments: Any) -> T | None:
        """The same, of what blocks; a call that hangs is left behind."""
        return await self.within(limit_s, what, lambda: in_thread(call, *arguments, abandon_on_cancel=True))

    def note(self, what: str, why: str) -> None:
        self.unknown.append(Unknown(what, why))

"""Finding things out, each within its own time; what fails is noted, and holds up nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from hypha.cli.doctor.gathered import Unknown
from hypha.errors import HyphaError
from hypha.naming import cleaned

T = TypeVar("T")
#: of a sentence that a peer has written
_MOST = 500


def readable(text: str) -> str:
    """``text``, which a peer may have written, in one line without anything that controls a terminal."""
    return cleaned(text, _MOST)


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

    def note(self, what: str, why: str) -> None:
        """``what`` is not known, and ``why``."""
        self.unknown.append(Unknown(what, why))

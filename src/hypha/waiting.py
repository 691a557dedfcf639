"""Whatever waits for long says what it waits for: after a minute, and once a minute at most from then on.

:func:`reminded` stands around one thing that is waited for, a :class:`Reminder` in a loop that asks again and
again. Both go by trio's clock, which in tests and in the simulation is a virtual one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import outcome
import trio

T = TypeVar("T")

#: Who says nothing for longer seems to be dead.
SILENT_S = 60.0
#: Where nothing is wrong and there is nothing to do, it is said less and less often, but once an hour.
IDLE_S = 3600.0


class Reminder:
    """Says when it is time to speak: after a minute, and each from then on; with ``at_once`` for the first
    time now. Pauses double up to ``longest_s``.
    """

    def __init__(self, *, at_once: bool = False, longest_s: float = SILENT_S) -> None:
        self._at_once = at_once
        self._longest_s = longest_s
        self.reset()

    def reset(self) -> None:
        """It goes on: there is nothing to say before it stands still again."""
        self._pause_s = SILENT_S
        self.next_at = trio.current_time() + (0.0 if self._at_once else SILENT_S)

    def due(self) -> bool:
        """Whether to speak now; once it has said so, it is silent for a while."""
        now = trio.current_time()
        if now < self.next_at:
            return False
        self.next_at = now + self._pause_s
        self._pause_s = min(2.0 * self._pause_s, self._longest_s)
        return True


async def reminded(wait: Callable[[], Awaitable[T]], say: Callable[[float], None]) -> T:
    """What ``await wait()`` returns or raises. Meanwhile ``say`` is called with the seconds that it has taken
    so far, once a minute.
    """
    began = trio.current_time()

    async def speak() -> None:
        while True:
            await trio.sleep(SILENT_S)
            say(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speak)
        # kept, and not raised here, where the nursery would wrap it
        result = await outcome.acapture(wait)
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint_if_cancelled()
    return result.unwrap()


def in_words(seconds: float) -> str:
    """``90 s`` or ``12 min``."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def log_waiting(
    logger: logging.Logger, what: str | Callable[[], str], **fields: str | int | float
) -> Callable[[float], None]:
    """For :func:`reminded`: an entry that says ``what`` is waited for, and for how long already."""

    def say(waited_s: float) -> None:
        text = what() if callable(what) else what
        logger.info("Waiting for %s since %s.", text, in_words(waited_s), extra=fields)

    return say

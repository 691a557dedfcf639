"""What a job waits for, for people who read its log: one sentence once it has stood still for a minute, and
one a minute from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio

from hypha.naming import shown
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.state import OPEN, RoundState
from hypha.waiting import Reminder, in_words

logger = logging.getLogger(__name__)

#: named of each kind; a hundred names would hide what is said of them
_MOST_NAMED = 5


class Awaiting:
    """Looks at where a job is, as often as it is told to. It stands still while it is at the same place."""

    def __init__(self) -> None:
        self._place: object = None
        self._since = trio.current_time()
        self._reminder = Reminder()

    def look(self, place: object, what: Callable[[], str]) -> None:
        """The job is at ``place``; ``what`` says what it waits for there."""
        if place != self._place:
            self._place, self._since = place, trio.current_time()
            self._reminder.reset()
        elif self._reminder.due():
            logger.info("For %s now: %s.", in_words(trio.current_time() - self._since), what())


def awaited(machine: RoundState) -> str:
    """Whom the round machine waits for, by name; empty where it is nobody of the job."""
    server = shown(machine.server.peer) if machine.server is not None else ""
    if machine.phase == "loading":
        loading = [member for member in machine.members.values() if not member.loaded]
        waits = [f"{_named(loading)} to load the model"] if loading else []
        if server and not machine.server_ready:
            waits.append(f"the parameter server {server} to load it")
        return " and for ".join(waits)
    if machine.phase in OPEN:
        open_ = [member for member in machine.participants if not member.accepted]
        return "; ".join(
            f"{_named(those)} {state}"
            for state in ("unreachable", "loading", "waiting", "training", "scheduled", "updating")
            if (those := [member for member in open_ if member.state(machine.round) == state])
        )
    if machine.phase == "closing":
        return f"the outer step of the parameter server {server}"
    return ""


def _named(members: Iterable[Member]) -> str:
    """``worker-1 (…wTqXNUgL, batch 4 of 20) and 3 others``."""
    found = sorted(members, key=lambda member: (member.batches, member.peer))
    words = [
        f"{shown(one.peer)}" + (f" at batch {one.batches} of {one.plan or '?'}" if one.batches else "")
        for one in found[:_MOST_NAMED]
    ]
    left = len(found) - len(words)
    return ", ".join(words) + (f" and {left} others" if left else "")

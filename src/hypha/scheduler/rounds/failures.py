"""Training executors that failed: what is said of them, and whether they are started again.

An executor that goes on strike says why (``ExecutorError``), and its worker says how it ended
(``ExecutorExited``: exit code, last lines). Both make one failure, judged when the second is here or has not
come for a while. It is answered by the same executor again, under the same lease, after a pause that grows;
used up, by another worker. What an executor that is over still says is not believed. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hypha.backoff import pause_after
from hypha.messages import ExecutorError, ExecutorExited
from hypha.scheduler.rounds.events import Action, Again, Drop, Fail
from hypha.scheduler.rounds.policy import Failures

#: an executor that said why it fails has so long to end
_LAST_WORDS_S = 10.0
#: before the first restart, what each further one has to wait longer, and the longest
_FIRST_PAUSE_S, _PAUSE_GROWTH, _LONGEST_PAUSE_S = 0.2, 4.0, 60.0


@dataclass(frozen=True)
class _Failing:
    peer: str
    error: ExecutorError
    until: float


class Failing:
    """Of one generation of a job; ``restarts``: how often a worker's executor is started again."""

    def __init__(self, failures: Failures, restarts: int) -> None:
        self._failures = failures
        self._restarts = restarts
        self._failing: dict[str, _Failing] = {}
        self._over: set[str] = set()

    def over(self, incarnation: str) -> None:
        """It takes no part any more."""
        self._over.add(incarnation)

    def is_over(self, incarnation: str) -> bool:
        """Is that an executor of the past?"""
        return incarnation in self._over

    def forget(self, peer: str) -> None:
        """Its lease is gone, so there is nothing to be started again."""
        self._failing = {key: one for key, one in self._failing.items() if one.peer != peer}

    def failed(
        self,
        peer: str,
        incarnation: str,
        event: ExecutorError | ExecutorExited,
        now: float,
        others: Collection[str] = (),
    ) -> list[Action]:
        """An executor of ``peer``, which took part until now, says that it fails, or has ended. ``others``
        are the further workers in the job.
        """
        self.over(incarnation)
        if isinstance(event, ExecutorExited):
            return self._judge(peer, incarnation, exit_text(event), "exit")
        if event.kind in ("model", "batch"):
            # another would say the same, so there is nothing to wait for
            return self._judge(peer, incarnation, event.message, event.kind, others)
        self._failing[incarnation] = _Failing(peer, event, now + _LAST_WORDS_S)
        return []

    def exited(self, incarnation: str, event: ExecutorExited) -> list[Action]:
        """An executor that is over has ended."""
        failing = self._failing.pop(incarnation, None)
        if failing is None:
            return []
        text = f"{failing.error.message}; {exit_text(event)}"
        return self._judge(failing.peer, incarnation, text, failing.error.kind)

    def advance(self, now: float) -> list[Action]:
        """Judge those whose end was not heard of."""
        actions: list[Action] = []
        for incarnation, failing in list(self._failing.items()):
            if now >= failing.until:
                del self._failing[incarnation]
                error = failing.error
                actions += self._judge(failing.peer, incarnation, error.message, error.kind)
        return actions

    def _judge(
        self, peer: str, incarnation: str, message: str, cause: str, others: Collection[str] = ()
    ) -> list[Action]:
        error = self._failures.add(peer, "train", message, cause, others)
        if error is not None:
            return [Fail(error)]
        if cause == "model" or self._failures.restarts[peer] >= self._restarts:
            return [Drop(peer, "train", message)]
        self._failures.restarts[peer] += 1
        earlier = self._failures.restarts[peer] - 1
        pause_s = pause_after(earlier, _FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_GROWTH)
        return [Again(peer, message, pause_s, incarnation)]


def exit_text(event: ExecutorExited) -> str:
    """Exit code and last lines."""
    text = f"the executor ended with exit code {event.exit_code}"
    return f"{text}\n{event.tail}" if event.tail else text

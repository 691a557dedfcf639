"""Executors that failed: when the job ends of it, and whether a training executor is started again.

A training executor that goes on strike says why (``ExecutorError``), and its worker says how it ended
(``ExecutorExited``: exit code, last lines). Both make one failure, judged when the second is here or has not
come for a while. It is answered by the same executor again, under the same lease, after a pause that grows;
used up, by another worker. What an executor that is over still says is not believed. Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from hypha.backoff import pause_after
from hypha.errors import ExecutorFailed, HyphaError, JobFailed, ModelError, NotFinite
from hypha.messages import ExecutorError, ExecutorExited
from hypha.scheduler.rounds.events import Again, Drop, Fail
from hypha.scheduler.rounds.policy import CarriedOver

#: losses that were not finite, of several workers or of one, after which a job is given up
_DIVERGED, _DIVERGED_ALONE = 3, 5
#: an executor that said why it fails has so long to end
_LAST_WORDS_S = 10.0
#: before the first restart, what each further one has to wait longer, and the longest
_FIRST_PAUSE_S, _PAUSE_GROWTH, _LONGEST_PAUSE_S = 0.2, 4.0, 60.0


#: what becomes of a failed training executor
Decision = Again | Drop | Fail


@dataclass(frozen=True)
class _Failing:
    peer: str
    error: ExecutorError
    until: float


class Failures:
    """Since the last applied round, some of them ``carried`` over from an earlier generation; ``limit`` of
    them end the job. A worker's executor is started again ``most_restarts`` times.
    """

    def __init__(self, limit: int, most_restarts: int, carried: CarriedOver) -> None:
        self._limit = limit
        self._most_restarts = most_restarts
        self._failing: dict[str, _Failing] = {}
        #: incarnations that take no part any more
        self.over: set[str] = set()
        self.in_a_row = carried.in_a_row
        #: workers whose loss, or update, was not finite, each as often
        self._not_finite = Counter(dict(carried.not_finite))
        #: how often a worker's executor was started again since a round that holds its update
        self.restarts = Counter(dict(carried.restarts))
        #: what any executor would say again -> the workers whose executors have said it, each as often
        self._alike: dict[str, Counter[str]] = {}
        for what, peer, times in carried.alike:
            self._alike.setdefault(what, Counter())[peer] = times

    def hand_on(self, short_since: float | None, had_model: Iterable[str] = ()) -> CarriedOver:
        """For the next generation."""
        return CarriedOver(
            in_a_row=self.in_a_row,
            not_finite=tuple(self._not_finite.items()),
            restarts=tuple(self.restarts.items()),
            short_since=short_since,
            had_model=tuple(sorted(had_model)),
            alike=tuple((what, *entry) for what, said in self._alike.items() for entry in said.items()),
        )

    def applied(self, contributors: Iterable[str]) -> None:
        """A round was applied: what failed before was overcome, and those did their part."""
        self.in_a_row = 0
        self._alike.clear()
        self._not_finite.clear()
        for peer in contributors:
            self.restarts.pop(peer, None)

    def add(self, peer: str, message: str, cause: str, others: Collection[str]) -> HyphaError | None:
        """Count one; the error with which the job ends if that was too much. ``others`` are the further
        workers that are in the job now.

        That the model is wrong, or that model and data do not go together, is believed when more workers say
        the same than others are there that do not: two of three, but not two of four, which may be liars
        beside a job that goes well. Where nobody else is there, two failures of one worker are enough. That
        training diverges is believed after the third time when two workers did, as one may have broken
        memory; else later.
        """
        self.in_a_row += 1
        if cause in ("model", "batch"):
            said = self._alike.setdefault(_fingerprint(cause, message), Counter())
            said[peer] += 1
            left = len(set(others) - said.keys())
            if said.total() > 1 and (left == 0 or len(said) > max(1, left)):
                return _of_the_job(cause, message, said.total())
        if cause == "not-finite":
            self._not_finite[peer] += 1
            times = self._not_finite.total()
            if times >= (_DIVERGED if len(self._not_finite) > 1 else _DIVERGED_ALONE):
                return NotFinite(
                    f"training diverges, {times} times on {len(self._not_finite)} worker(s) without an "
                    f"applied round in between: {message}"
                )
        if self.in_a_row >= self._limit:
            if cause in ("model", "batch"):
                return _of_the_job(cause, message, self.in_a_row)
            text = (
                f"{self.in_a_row} executors failed in a row without an applied round; the last one: {message}"
            )
            return ExecutorFailed(text) if cause == "exit" else JobFailed(text)
        return None

    def forget(self, peer: str) -> None:
        """Its lease is gone, so there is nothing to be started again."""
        self._failing = {key: one for key, one in self._failing.items() if one.peer != peer}

    def failed(
        self,
        peer: str,
        incarnation: str,
        event: ExecutorError | ExecutorExited,
        now: float,
        others: Collection[str],
    ) -> Decision | None:
        """An executor of ``peer``, which took part until now, says that it fails, or has ended. ``others``
        are the further workers in the job.
        """
        self.over.add(incarnation)
        if isinstance(event, ExecutorExited):
            return self._judge(peer, incarnation, exit_text(event), "exit")
        if event.kind in ("model", "batch"):
            # another would say the same, so there is nothing to wait for
            return self._judge(peer, incarnation, event.message, event.kind, others)
        self._failing[incarnation] = _Failing(peer, event, now + _LAST_WORDS_S)
        return None

    def exited(self, incarnation: str, event: ExecutorExited) -> Decision | None:
        """An executor that is over has ended."""
        failing = self._failing.pop(incarnation, None)
        if failing is None:
            return None
        text = f"{failing.error.message}; {exit_text(event)}"
        return self._judge(failing.peer, incarnation, text, failing.error.kind)

    def overdue(self, now: float) -> list[Decision]:
        """Judge those whose end was not heard of."""
        due = [(key, one) for key, one in self._failing.items() if now >= one.until]
        for incarnation, _ in due:
            del self._failing[incarnation]
        return [self._judge(one.peer, key, one.error.message, one.error.kind) for key, one in due]

    def _judge(
        self, peer: str, incarnation: str, message: str, cause: str, others: Collection[str] = ()
    ) -> Decision:
        error = self.add(peer, message, cause, others)
        if error is not None:
            return Fail(error)
        if cause == "model" or self.restarts[peer] >= self._most_restarts:
            return Drop(peer, "train", message)
        self.restarts[peer] += 1
        earlier = self.restarts[peer] - 1
        pause_s = pause_after(earlier, _FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_GROWTH)
        return Again(peer, message, pause_s, incarnation)


def _of_the_job(cause: str, message: str, times: int) -> HyphaError:
    what = "the model cannot be used" if cause == "model" else "the model cannot be trained on this data"
    line, _, rest = message.partition("\n")
    text = f"{what}: {line} (said by {times} executors)"
    return (ModelError if cause == "model" else JobFailed)(f"{text}\n{rest}" if rest else text)


def _fingerprint(cause: str, message: str) -> str:
    """What is the same in two messages about one mistake: of two batches the first line, without numbers; a
    model is one for all executors.
    """
    return (
        cause if cause == "model" else cause + re.sub(r"[-+]?\d[\d.,e+-]*", "#", message.partition("\n")[0])
    )


def exit_text(event: ExecutorExited) -> str:
    text = f"the executor ended with exit code {event.exit_code}"
    return f"{text}\n{event.tail}" if event.tail else text

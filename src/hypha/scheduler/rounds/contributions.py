"""The open round's books: whose update is in, what each stands for, and the ledger entry that results."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from hypha.contributions import MOST_COUNT
from hypha.messages import Contribution, LedgerRound, RoundApplied, UpdateStatistics
from hypha.scheduler.rounds.claims import bounded_loss

#: applied rounds whose late contributions still enter the ledger
_REMEMBERED_ROUNDS = 4


class RoundContributions:
    """``accepted``: samples by worker, as the parameter server said; ``contributions``: as workers said."""

    def __init__(self) -> None:
        self.opened_at = 0.0
        self.quorum_since: float | None = None
        self.complete_since: float | None = None
        self.accepted: dict[str, int] = {}
        self.contributions: dict[str, Contribution] = {}
        #: of those in ``accepted``, whose update came early, as they leave: it says nothing of how far the
        #: others are
        self.departed: set[str] = set()
        self._applied: dict[int, tuple[LedgerRound, set[str], tuple[str, ...]]] = {}

    def open_round(self, now: float) -> None:
        """Nothing is in yet."""
        self.opened_at = now
        self.quorum_since = self.complete_since = None
        self.accepted = {}
        self.contributions = {}
        self.departed = set()

    @property
    def stayed(self) -> list[str]:
        """Whose update is in, without those who have left."""
        return [worker for worker in self.accepted if worker not in self.departed]

    def note(self, part: Contribution) -> Contribution:
        """A worker's word of its update; a loss that is no number becomes 0, as JSON knows none."""
        part = msgspec.structs.replace(part, loss=bounded_loss(part.loss, 0.0))
        self.contributions[part.worker] = part
        return part

    def explained(self, workers: Iterable[str]) -> bool:
        """Every accepted update of ``workers`` has its contribution."""
        return all(worker in self.contributions for worker in workers if worker in self.accepted)

    def apply(self, event: RoundApplied, generation: int, now: float) -> LedgerRound:
        """The ledger entry of the round that was applied."""
        within = [self.contributions[worker] for worker in event.contributors if worker in self.contributions]
        without = [part for worker, part in self.contributions.items() if worker not in event.contributors]
        entry = _with(
            LedgerRound(
                round=event.round,
                theta=event.theta,
                contributors=(),
                left_out=tuple(sorted(without, key=lambda part: part.worker)),
                generation=generation,
                update_norm=event.update_norm if math.isfinite(event.update_norm) else 0.0,
                duration_s=now - self.opened_at,
                updates=tuple(_finite(one) for one in event.updates if one.worker in event.contributors),
            ),
            within,
            event.contributors,
        )
        missing = set(event.contributors) - {part.worker for part in within}
        self._applied[event.round] = (entry, missing, event.contributors)
        for old in [number for number in self._applied if number <= event.round - _REMEMBERED_ROUNDS]:
            del self._applied[old]
        return entry

    def late(self, contribution: Contribution) -> LedgerRound | None:
        """The completed entry, when an applied round still lacked ``contribution``."""
        entry, missing, order = self._applied.get(contribution.round, (None, set(), ()))
        if entry is None or contribution.worker not in missing:
            return None
        missing.discard(contribution.worker)
        contribution = msgspec.structs.replace(contribution, loss=bounded_loss(contribution.loss, 0.0))
        completed = _with(entry, (*entry.contributors, contribution), order)
        self._applied[entry.round] = (completed, missing, order)
        return completed


def _finite(found: UpdateStatistics) -> UpdateStatistics:
    """As JSON can hold it: of what is no number nothing is known."""
    cosine = found.cosine if found.cosine is not None and math.isfinite(found.cosine) else None
    norm = found.norm if math.isfinite(found.norm) else 0.0
    size = min(max(0, found.size_bytes), MOST_COUNT)
    clips = found.buffer_clips
    if clips is not None:
        clips = {name: clip for name, clip in clips.items() if math.isfinite(clip)}
    return msgspec.structs.replace(found, norm=norm, cosine=cosine, size_bytes=size, buffer_clips=clips)


def _with(entry: LedgerRound, contributors: Iterable[Contribution], order: tuple[str, ...]) -> LedgerRound:
    """``entry`` with these contributors, its sums made anew. They stand in the order in which the parameter
    server added them: floating-point sums depend on it, and so does a replay that is to be equal bit by bit.
    """
    parts = tuple(sorted(contributors, key=lambda part: order.index(part.worker)))
    samples = sum(part.samples for part in parts)
    loss = sum(part.loss * part.samples for part in parts) / samples if samples else 0.0
    return msgspec.structs.replace(entry, contributors=parts, samples=samples, loss=loss)

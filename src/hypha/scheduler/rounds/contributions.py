"""The updates that are in the open round, what each stands for, and the ledger entry that results.

All of it is what the parameter server reports: it has read it in the headers of the update files.
"""

from __future__ import annotations

import math

import msgspec

from hypha.messages import Contribution, LedgerRound, RoundApplied, UpdateStatistics
from hypha.rules.contributions import MOST_COUNT
from hypha.scheduler.rounds.claims import bounded_loss


class RoundContributions:
    """``accepted``: what the updates stand for that the parameter server has added, by worker."""

    def __init__(self) -> None:
        self.opened_at = 0.0
        self.quorum_since: float | None = None
        self.accepted: dict[str, Contribution] = {}
        #: of those in ``accepted``, whose update came early, as they leave: it says nothing of how far the
        #: others are
        self.departed: set[str] = set()

    def open_round(self, now: float) -> None:
        """Nothing is in yet."""
        self.opened_at = now
        self.quorum_since = None
        self.accepted = {}
        self.departed = set()

    @property
    def samples(self) -> int:
        """For which the accepted updates stand."""
        return sum(part.samples for part in self.accepted.values())

    @property
    def stayed(self) -> list[str]:
        """Whose update is in, without those who have left."""
        return [worker for worker in self.accepted if worker not in self.departed]

    def accept(self, part: Contribution) -> None:
        """The parameter server has added an update; a loss that is no number becomes 0, as JSON knows none.
        What is reported again changes nothing.
        """
        if part.worker not in self.accepted:
            self.accepted[part.worker] = msgspec.structs.replace(part, loss=bounded_loss(part.loss, 0.0))

    def finished(self, worker: str) -> tuple[tuple[int, int], ...]:
        """The (epoch, slice) pairs that are USED once the round is applied with the update of ``worker``."""
        part = self.accepted.get(worker)
        return part.finished if part is not None else ()

    def entry(self, event: RoundApplied, generation: int, now: float) -> LedgerRound:
        """The ledger entry of the round that was applied. Contributors stand in the order in which the
        parameter server added them: floating-point sums depend on it, and so does a replay that is to be
        equal bit by bit.
        """
        parts = tuple(self.accepted[worker] for worker in event.contributors if worker in self.accepted)
        samples = sum(part.samples for part in parts)
        loss = sum(part.loss * part.samples for part in parts) / samples if samples else 0.0
        return LedgerRound(
            round=event.round,
            theta=event.theta,
            contributors=parts,
            generation=generation,
            samples=samples,
            loss=loss,
            update_norm=event.update_norm if math.isfinite(event.update_norm) else 0.0,
            duration_s=now - self.opened_at,
            updates=tuple(_finite(one) for one in event.updates if one.worker in event.contributors),
        )


def _finite(found: UpdateStatistics) -> UpdateStatistics:
    """As JSON can hold it: of what is no number nothing is known."""
    cosine = found.cosine if found.cosine is not None and math.isfinite(found.cosine) else None
    norm = found.norm if math.isfinite(found.norm) else 0.0
    size = min(max(0, found.size_bytes), MOST_COUNT)
    clips = found.buffer_clips
    if clips is not None:
        clips = {name: clip for name, clip in clips.items() if math.isfinite(clip)}
    return msgspec.structs.replace(found, norm=norm, cosine=cosine, size_bytes=size, buffer_clips=clips)

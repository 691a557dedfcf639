"""The updates that are in the open round, the ledger entry that results, and when the round is closed: with
everybody, with a quorum after the grace, or at the deadline.

What an update stands for is what the parameter server reports: it has read it in the header of the file.

A worker that theta did not reach in time for two rounds in a row is waited for in the third, until the
deadline: rounds may be shorter than the way to it.

Pure: the round machine acts on the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from hypha.messages import Contribution, LedgerRound, RoundApplied, UpdateStatistics
from hypha.rules.contributions import MOST_COUNT
from hypha.scheduler.rounds.participants import Member, bounded_loss
from hypha.scheduler.rounds.policy import Rules

#: a worker left out so often in a row, or refused so often, is replaced; in the last such round it is awaited
PATIENCE = 3
#: one that began so many rounds in a row, and sent no update of them, too; in the second the grace is all
#: that it gets
STALLED = 2
#: while no update at all is here, a worker is waited for so many times as long
_LAST_PATIENCE = 5.0

#: who is waited for no longer, and why
Overdue = tuple[Member, str]


@dataclass
class RoundContributions:
    """Of a round. ``accepted``: what the updates stand for that the parameter server has added, by worker."""

    opened_at: float = 0.0
    quorum_since: float | None = None
    accepted: dict[str, Contribution] = field(default_factory=dict)
    #: of those in ``accepted``, whose update came early, as they leave: it says nothing of how far the others
    #: are
    departed: set[str] = field(default_factory=set)

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


def may_close(
    updates: RoundContributions,
    participants: Sequence[Member],
    rules: Rules,
    round_: int,
    now: float,
    starved: bool,
) -> bool:
    """With at least one accepted update: shall ``round_`` be closed now? Notes in ``updates`` since when it
    has had its quorum. ``starved``: nobody serves data, so deadlines do not run.
    """
    waiting = [member for member in participants if not member.accepted]
    # who was left out and has not come back yet, or cannot be reached, is not waited for; but rounds shorter
    # than the way of theta to a worker must not keep it out for ever
    behind = [member for member in waiting if member.missed and member.started < round_]
    expected = [member for member in behind if member.missed + 1 >= PATIENCE]
    awaited = [
        member for member in waiting if not member.absent and (member not in behind or member in expected)
    ]
    coming = [
        member
        for member in expected
        if not (member.absent or starved or is_overdue(member, rules, round_, now))
    ]
    # an update that came early, as its worker leaves, is in the round, and hurries nobody
    here = len(updates.stayed)
    quorum = not coming and here >= math.ceil(rules.quorum * (here + len(waiting)) - 1e-9)
    if not quorum:
        updates.quorum_since = None
    elif updates.quorum_since is None:
        updates.quorum_since = now
    if not awaited or (updates.quorum_since is not None and now >= updates.quorum_since + rules.grace_s):
        return True
    return not starved and all(is_overdue(member, rules, round_, now) for member in awaited)


def is_overdue(member: Member, rules: Rules, round_: int, now: float) -> bool:
    """Its update should be here by now; whoever let a whole deadline pass lately gets the grace alone."""
    patience_s = min(rules.grace_s, rules.deadline_s) if member.stalled else rules.deadline_s
    return _is_due(member, patience_s, round_, now)


def given_up(participants: Iterable[Member], rules: Rules, round_: int, now: float) -> list[Overdue]:
    """Without any accepted update: those whose update should have been here long ago."""
    patience_s = _LAST_PATIENCE * rules.deadline_s
    text = "its update did not come, and nobody else's did"
    return [(member, text) for member in participants if _is_due(member, patience_s, round_, now)]


def stuck(members: Iterable[Member], rules: Rules, now: float) -> list[Overdue]:
    """Whose executor was told long ago that the job goes on in this generation, and is in its batch still."""
    patience_s = _LAST_PATIENCE * rules.deadline_s
    return [
        (member, "the job goes on, and the batch it was in does not end")
        for member in members
        if not (member.loaded or member.absent or member.told_at is None)
        and now >= member.told_at + patience_s
    ]


def never_loaded(members: Iterable[Member], rules: Rules, now: float) -> list[Overdue]:
    """Who does not load the model, while others have: within ``rules.load_s``, or three times what it took
    the quickest of them.
    """
    known = list(members)
    quickest_s = min((one.load_s for one in known if one.loaded and one.load_s is not None), default=None)
    if rules.load_s is None or quickest_s is None:
        return []
    patience_s = max(rules.load_s, 3.0 * quickest_s)
    return [
        (member, f"it has not loaded the model after {now - member.joined_at:.0f} s, and others have")
        for member in known
        if not (member.loaded or member.absent or member.told_at is not None)
        and now >= member.joined_at + patience_s
    ]


def _is_due(member: Member, deadline_s: float, round_: int, now: float) -> bool:
    due = member.due_at(deadline_s, round_)
    return due is not None and now >= due


def _finite(found: UpdateStatistics) -> UpdateStatistics:
    """As JSON can hold it: of what is no number nothing is known."""
    cosine = found.cosine if found.cosine is not None and math.isfinite(found.cosine) else None
    norm = found.norm if math.isfinite(found.norm) else 0.0
    size = min(max(0, found.size_bytes), MOST_COUNT)
    clips = found.buffer_clips
    if clips is not None:
        clips = {name: clip for name, clip in clips.items() if math.isfinite(clip)}
    return msgspec.structs.replace(found, norm=norm, cosine=cosine, size_bytes=size, buffer_clips=clips)

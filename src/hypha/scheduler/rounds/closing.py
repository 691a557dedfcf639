"""When an open round is closed: with everybody, with a quorum after the grace, or at the deadline.

A worker that theta did not reach in time for two rounds in a row is waited for in the third, until the
deadline: rounds may be shorter than the way to it.

Pure questions about contributions and participants; the round machine acts on the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hypha.scheduler.rounds.contributions import RoundContributions
from hypha.scheduler.rounds.participants import Member
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

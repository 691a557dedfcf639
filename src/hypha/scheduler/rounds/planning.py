"""When to tell workers their sync point, and when to tell them again.

A plan goes out as early as possible, so that no worker passes its sync point while a report is under way,
and is refined as the end comes nearer: each time half of the projected rest has passed, when a batch time
turns out to be different, or somebody comes or goes. It is final once the rest is shorter than a report
needs. Every refinement states absolute counts, so a late or repeated one does no harm. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.rounds.projection import Projection, project

#: what a report and a directive need, generously
LATENCY_S = 0.3
#: between two refinements
_LEAST_PAUSE_S = 0.05
#: a batch time that changed by more than this share asks for a refinement
_CHANGED = 0.15


class Planner:
    """Plans for a round. ``samples`` is its target over all workers; with ``inner_steps`` every worker takes
    that many optimizer steps instead, of as many batches each as it accumulates gradients over.
    """

    def __init__(self, samples: int, inner_steps: int | None, opened_at: float) -> None:
        self.samples = samples
        self.inner_steps = inner_steps
        self.final = False
        self._opened_at = opened_at
        self._next_at = -math.inf
        self._planned_at = -math.inf
        self._based_on: dict[str, float] = {}

    def upset(self) -> None:
        """Somebody came, went or restarted: plan again."""
        self._next_at = -math.inf
        self._based_on = {}

    def plan(
        self, members: Sequence[Member], accepted_samples: int, round_: int, now: float, close: bool = False
    ) -> dict[str, int]:
        """New or changed plans of ``members`` (those who take part and whose update is not accepted yet).

        ``close`` makes this the last plan of the round: even who never reported gets one.
        """
        if self.inner_steps is not None:
            waiting = [member for member in members if member.plan is None]
            return {member.peer: self.inner_steps * member.multiple for member in waiting}
        free = [member for member in members if not member.fixed]
        if self.final:
            return {member.peer: member.multiple for member in free if member.plan is None}
        if not free or not (close or now >= self._next_at or self._changed(free, now)):
            return {}
        wanted = self.samples - accepted_samples - sum(member.samples for member in members if member.fixed)
        projection = self._project(free, max(0, wanted), round_, now)
        if projection is None and not close:
            # nobody's pace is known: only a target already reached ends the round
            if wanted > sum(member.samples for member in free):
                return {}
            close = True
        rest = projection.ends_in_s if projection is not None else 0.0
        self._planned_at = now
        self._next_at = now + max(_LEAST_PAUSE_S, rest / 2.0)
        self._based_on = {member.peer: member.batch_time.value_s or 0.0 for member in free}
        longest = max((member.batch_time.value_s or 0.0 for member in free), default=0.0)
        self.final = close or rest <= max(LATENCY_S, longest)
        planned = dict(projection.batches) if projection is not None else {}
        if self.final:
            for member in free:
                planned.setdefault(member.peer, max(member.multiple, member.batches))
        known = {member.peer: member.plan for member in free}
        return {peer: batches for peer, batches in planned.items() if known[peer] != batches}

    def _project(self, free: Sequence[Member], wanted: int, round_: int, now: float) -> Projection | None:
        paces = [pace for member in free if (pace := member.pace(now, round_)) is not None]
        if not paces:
            return None
        unknown = sum(member.samples for member in free if member.batch_time.value_s is None)
        return project(paces, max(0, wanted - unknown), now - self._opened_at)

    def _changed(self, free: Sequence[Member], now: float) -> bool:
        if now < self._planned_at + _LEAST_PAUSE_S:
            return False
        for member in free:
            value, used = member.batch_time.value_s, self._based_on.get(member.peer)
            if value is not None and (not used or abs(value - used) > _CHANGED * used):
                return True
        return False

"""How large an update may be, beside those of recent rounds: a huge one is scaled down, not believed.

The limit is the job's ``max_update_norm`` where it states one. Else it is ``max_update_ratio`` times the
median of the norms of the updates of the last rounds, as they were sent; what is larger is scaled down to
that median, so that it moves theta as far as another, and not further. Updates are added to the sum as they
come, so the median of their own round is not known then. That of the rounds before it is, and norms change
little from one round to the next: by less than half even at the end of a warm-up. A parameter server that has
seen no round yet keeps the first updates aside until the round is closed, or so many are there, and takes the
median of those: the lower one of an even number, so that of two the smaller counts.

By how much an update was scaled is in the ledger (``UpdateStatistics.clip``), and a replay does the same.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from hypha.messages import AggregateJob

#: rounds whose norms are remembered
ROUNDS = 4
#: updates of a first round that are kept aside: their files take room on the disk
MOST_ASIDE = 16


class NormLimit:
    """Of one parameter server, round after round."""

    def __init__(self, job: AggregateJob) -> None:
        self._most = job.max_update_norm
        self._ratio = job.max_update_ratio
        self._rounds: deque[tuple[float, ...]] = deque(maxlen=ROUNDS)

    @property
    def is_known(self) -> bool:
        """:meth:`clip` can tell now; else norms have to be seen first."""
        return self._most is not None or self._ratio is None or bool(self._rounds)

    def saw(self, norms: Iterable[float]) -> None:
        """The norms of a round's updates, as they were sent."""
        if found := tuple(norm for norm in norms if norm > 0.0):
            self._rounds.append(found)

    def clip(self, norm: float) -> float:
        """What an update of that norm is multiplied by."""
        if self._most is not None:
            return min(1.0, self._most / max(norm, 1e-30))
        if self._ratio is None or not self._rounds or norm <= self._ratio * self.median():
            return 1.0
        return self.median() / norm

    def median(self) -> float:
        """Of the rounds that are remembered; 0.0 where there is none."""
        known = [norm for norms in self._rounds for norm in norms]
        return statistics.median_low(known) if known else 0.0

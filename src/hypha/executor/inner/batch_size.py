"""How many rows a batch has, where the job lets it grow: from round to round, while memory and speed allow.

A size is doubled after a round in which a batch went through the model at once, and faster than one of the
size before. One that is no faster, or that did not fit, was one too many: the size before it stays. A round
has one size, so that what it did can be computed again.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("hypha.executor.training")

#: so much faster must the larger one be
_FASTER = 1.05
#: batches of a round from which its speed is known well enough
_ENOUGH = 4


class BatchSize:
    """``rows`` a batch, at first; ``most`` is how many it may become, None: it does not grow."""

    def __init__(self, rows: int, most: int | None) -> None:
        self.rows = rows
        self._most = most
        #: the size before, and its rows a second
        self._before: tuple[int, float] | None = None

    @property
    def grows(self) -> bool:
        """May it become larger?"""
        return self._most is not None and self.rows < self._most

    def round_ended(self, batches: int, busy_s: float, fitted: bool) -> None:
        """A round's ``batches`` of this size took ``busy_s`` seconds; ``fitted``: none was cut into parts."""
        if self._most is None or (fitted and (batches < _ENOUGH or busy_s <= 0)):
            return
        speed = self.rows * batches / busy_s if busy_s > 0 else 0.0
        slower = self._before is not None and speed < _FASTER * self._before[1]
        if not fitted or slower:
            # where nothing was tried yet, the rows at a time have been halved, and the batch stays
            if self._before is not None:
                self.rows = self._before[0]
            self._most = None
            why = "more are not faster" if fitted else "more do not fit into memory"
            logger.info("Batches have %d rows from now on: %s.", self.rows, why)
            return
        if not self.grows:
            self._most = None
            return
        self._before = self.rows, speed
        self.rows = min(2 * self.rows, self._most)
        logger.info("Batches of %d rows are tried from the next round on.", self.rows)

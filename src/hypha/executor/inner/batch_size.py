"""How many rows a batch has, how many of them go through the model at a time, and what is out of memory.

Where the job lets a batch grow, it does so from round to round, while memory and speed allow. A size is
doubled after a round in which a batch went through the model at once, and faster than one of the size before.
One that is no faster, or that did not fit, was one too many: the size before it stays. A round has one size,
so that what it did can be computed again.

A batch that does not fit is halved, and its parts' gradients are added up: the batch, the optimizer step and
the ledger's numbers are what they would have been, to within rounding. What took the memory may have been
somebody else, so after a while twice as many rows are tried again, each time that fails after twice as long.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("hypha.executor.training")

#: so much faster must the larger one be
_FASTER = 1.05
#: batches of a round from which its speed is known well enough
_ENOUGH = 4
#: how allocators that have no type of their own for it say so: torch's for the CPU, elsewhere and on Linux,
#: and cuBLAS, whose handles are allocated with the first product
_TEXTS = ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: batches after which more rows are tried again: the first time, and at most
_FIRST_PATIENCE, _LONGEST_PATIENCE = 64, 1 << 14


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


def is_out_of_memory(exc: BaseException) -> bool:
    """Did an allocation fail, on a device or on the CPU?"""
    if isinstance(exc, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(exc, RuntimeError) and any(text in str(exc) for text in _TEXTS)


def free_cached_memory() -> None:
    """Give back what torch keeps of a device's memory for later: after a failure it is in pieces that are
    too small.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class RowsAtATime:
    """Of batches of at most ``whole`` rows. ``most`` is what the job allows at a time (None: all), ``least``
    below how many it makes no sense (layers that take statistics of a batch need two).
    """

    def __init__(self, most: int | None = None, least: int = 1) -> None:
        self._most = most
        self._least = least
        #: rows that are known to fit, since more did not
        self._limit: int | None = None
        self._patience = _FIRST_PATIENCE
        self._since = 0
        #: they are more again than the last time that some did not fit
        self._grown = False

    @property
    def limited(self) -> bool:
        """Did some not fit, and were as many not tried again yet?"""
        return self._limit is not None

    def parts(self, rows: int) -> int:
        """Into how many parts a batch of ``rows`` rows is cut."""
        at_a_time = min(one for one in (rows, self._most, self._limit) if one is not None)
        return max(1, -(-rows // max(1, at_a_time)))

    def fitted(self, rows: int) -> None:
        """A batch of ``rows`` rows was trained on; now and then, more may be tried."""
        if self._limit is None:
            return
        self._since += 1
        if self._since < self._patience:
            return
        self._since, self._grown = 0, True
        self._limit = 2 * self._limit if 2 * self._limit < rows else None
        logger.info("%s rows at a time are tried again.", self._limit or rows)

    def failed(self, rows: int) -> bool:
        """The parts of a batch of ``rows`` rows did not fit: from now on there are twice as many. False where
        they are as small as can be.
        """
        size = -(-rows // self.parts(rows))
        if size // 2 < self._least:
            return False
        if self._grown:
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        self._limit, self._since, self._grown = size // 2, 0, False
        logger.warning(
            "%d rows at a time do not fit into memory; from now on it is %d, whose gradients are added up to "
            "those of the whole batch of %d.",
            size,
            self._limit,
            rows,
        )
        return True

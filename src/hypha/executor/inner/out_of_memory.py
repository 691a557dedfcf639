"""What counts as out of memory, and how many rows of a batch go through the model at a time because of it.

A batch that does not fit is halved, and its parts' gradients are added up: the batch, the optimizer step and
the ledger's numbers are what they would have been, to within rounding. What took the memory may have been
somebody else, so after a while twice as many rows are tried again, each time that fails after twice as long.
"""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("hypha.executor.training")

#: how allocators that have no type of their own for it say so: torch's for the CPU, elsewhere and on Linux,
#: and cuBLAS, whose handles are allocated with the first product
_TEXTS = ("not enough memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
#: batches after which more rows are tried again: the first time, and at most
_FIRST_PATIENCE, _LONGEST_PATIENCE = 64, 1 << 14


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

"""Which numbers the columns of a dataset hold: the smallest, the largest, and whether all are whole.

They stand in the manifest, so that a scheduler can tell that labels or tokens do not go with a model without
reading a slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hypha.config.tasks import IGNORED
from hypha.data.slices import DTYPES, Array
from hypha.messages import Column, ColumnRange


@dataclass
class _Seen:
    low: float = math.inf
    high: float = -math.inf
    whole: bool = True
    ignored: int = 0


@dataclass
class Ranges:
    """Takes note of the values that go by."""

    _seen: dict[str, _Seen] = field(default_factory=dict)

    def see_rows(self, rows: Array, columns: Iterable[Column]) -> None:
        """Take note of some records."""
        for column in columns:
            self.see(column, rows[column.name])

    def see(self, column: Column, values: Array) -> None:
        """Take note of some values of ``column``, as numpy holds them (``BF16`` as its bits). Those of a type
        that numpy does not have are passed over.
        """
        if column.dtype not in DTYPES or not values.size:
            return
        if column.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        seen = self._seen.setdefault(column.name, _Seen())
        if values.dtype.kind == "i" and values.min() <= IGNORED:
            left = values[values != IGNORED]
            seen.ignored += values.size - left.size
            values = left
        if not values.size:
            return
        seen.low = min(seen.low, float(values.min()))
        seen.high = max(seen.high, float(values.max()))
        if seen.whole and values.dtype.kind == "f":
            # of most columns of floats the first rows tell, and the others are not looked at
            seen.whole = bool((values == np.rint(values)).all())

    def of(self, columns: Iterable[Column]) -> tuple[ColumnRange, ...]:
        """Of those columns of which values were seen, and all of them finite."""
        return tuple(
            ColumnRange(
                column=column.name, low=seen.low, high=seen.high, whole=seen.whole, ignored=seen.ignored
            )
            for column in columns
            if (seen := self._seen.get(column.name)) is not None
            and math.isfinite(seen.low)
            and math.isfinite(seen.high)
        )

"""What a run of prepare read and made, for people: kind, rows, columns with an example, labels, what was
ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hypha.data.options import SourceKind
from hypha.data.slices import Array
from hypha.messages import Column

#: More different labels than these are not counted one by one.
MAX_COUNTED = 1000
#: So many labels are shown, and so many values of an example.
SHOWN_LABELS = 12
SHOWN_VALUES = 6
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Summary:
    """``labels`` are names (or numbers) with how many rows have them, by column; ``ignored`` are lines."""

    kind: SourceKind
    files: int
    rows: int
    columns: tuple[Column, ...]
    examples: Mapping[str, str]
    labels: Mapping[str, tuple[tuple[str, int], ...]]
    ignored: tuple[str, ...]

    def lines(self) -> list[str]:
        """As it is printed."""
        files = f" from {self.files} files" if self.files > 1 else ""
        found = [f"kind: {self.kind}", f"rows: {self.rows}{files}"]
        for column in self.columns:
            shape = f" {list(column.shape)}" if column.shape else ""
            found.append(f"column: {column.name} {column.dtype}{shape}, such as {self.examples[column.name]}")
        for name, counts in self.labels.items():
            shown = ", ".join(f"{label} ({count})" for label, count in counts[:SHOWN_LABELS])
            more = f" and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
            found.append(f"labels: {name} has {len(counts)}: {shown}{more}")
        found += [f"ignored: {line}" for line in self.ignored]
        return found


@dataclass
class RowCounts:
    """Counts the rows that go by."""

    rows: int = 0
    _first: Array | None = None
    _counts: dict[str, Counter[int]] = field(default_factory=dict)
    _many: set[str] = field(default_factory=set)

    def see(self, records: Array, columns: tuple[Column, ...], named: frozenset[str]) -> None:
        """Take note of some rows; ``named`` are columns of ids that have names."""
        if self._first is None and len(records):
            self._first = records[:1].copy()
        self.rows += len(records)
        for column in columns:
            counted = column.name in named or (column.name in _LABELS and column.dtype[0] in "IU")
            if not counted or column.shape or column.name in self._many:
                continue
            values, counts = np.unique(records[column.name], return_counts=True)
            counter = self._counts.setdefault(column.name, Counter())
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if len(counter) > MAX_COUNTED and column.name not in named:
                self._many.add(column.name)
                del self._counts[column.name]

    def unnamed(self, names: Mapping[str, tuple[str, ...]]) -> dict[str, Counter[int]]:
        """Ids that have none of their column's names, with how many rows have them."""
        odd = {
            column: Counter(
                {number: n for number, n in counter.items() if not 0 <= number < len(names[column])}
            )
            for column, counter in self._counts.items()
            if column in names
        }
        return {column: counter for column, counter in odd.items() if counter}

    def summary(
        self,
        kind: SourceKind,
        files: int,
        columns: tuple[Column, ...],
        names: Mapping[str, tuple[str, ...]],
        ignored: tuple[str, ...],
    ) -> Summary:
        """All that was seen; ``names`` are those behind ids, by column."""
        labels = {}
        for column, counter in self._counts.items():
            known = names.get(column, ())
            counts = {name: counter.get(number, 0) for number, name in enumerate(known)}
            counts |= {
                str(number): count
                for number, count in sorted(counter.items())
                if not 0 <= number < len(known)
            }
            labels[column] = tuple(counts.items())
        examples = {}
        if self._first is not None:
            examples = {column.name: _shown(column, self._first[column.name][0]) for column in columns}
        return Summary(kind, files, self.rows, columns, examples, labels, ignored)


def _shown(column: Column, value: Array) -> str:
    if column.dtype == "BF16":
        value = (np.asarray(value).astype(np.uint32) << 16).view(np.float32)
    flat = np.asarray(value).reshape(-1)
    texts = [f"{one:.6g}" if flat.dtype.kind == "f" else str(one) for one in flat[:SHOWN_VALUES].tolist()]
    return " ".join(texts) + (" ..." if len(flat) > SHOWN_VALUES else "")

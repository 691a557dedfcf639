"""Tables as sources: columns of numbers, of text that becomes ids, and of images that are decoded.

Text becomes ids in the order of the sorted different values; a first pass collects them. All files of a table
must have the same columns. Blocks are read one by one, so tables of any size will do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hypha.data.columns import Block, RowName, grouped, listed, needed
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
from hypha.data.sources.tables.arrow_columns import (
    is_list,
    is_text,
    longest,
    makes_tensor,
    padded,
    refuse_missing,
    to_array,
)
from hypha.errors import InputUnusable

if TYPE_CHECKING:
    from hypha.data.sources.image_decoding import Decoder

#: A column of text with more different values than this is not meant as labels.
MAX_LABELS = 10_000
#: Nor is one with more than this, when most rows have a value of their own.
FEW_LABELS = 50
#: Of rows that are left out so many are named.
NAMED_ROWS = 3


@dataclass(frozen=True)
class Batch:
    """Some rows of a file; each column is one array without dictionary encoding or extension types."""

    file: str
    columns: dict[str, Any]
    row: RowName

    @property
    def rows(self) -> int:
        return len(next(iter(self.columns.values())))

    def part(self, start: int, count: int) -> Batch:
        columns = {name: column.slice(start, count) for name, column in self.columns.items()}
        return Batch(self.file, columns, lambda index: self.row(start + index))

    def kept(self, mask: Array) -> Batch:
        numbers = np.flatnonzero(mask)
        columns = {name: column.filter(pa.array(mask)) for name, column in self.columns.items()}
        return Batch(self.file, columns, lambda index: self.row(int(numbers[index])))


class Table(ABC):
    """Rows in batches, of the columns ``names``. Their Arrow ``types`` are known, but for images and for
    those that cannot be read.
    """

    #: those which are images: the content of files, or structs of ``bytes`` and ``path``
    images: frozenset[str] = frozenset()
    #: names that the table itself knows for the ids in a column
    labels: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, names: Iterable[str], types: Mapping[str, Any], notes: Iterable[str] = ()) -> None:
        self.names = list(names)
        self.types = types
        self.texts = frozenset(name for name, kind in types.items() if is_text(kind))
        self._notes = list(notes)

    @property
    def notes(self) -> list[str]:
        """What was chosen or guessed; complete after the last batch."""
        return self._notes

    @abstractmethod
    def batches(self, names: list[str]) -> Iterator[Batch]:
        """These columns of all rows."""


def other_columns(path: Path, names: list[str], first: Path, expected: list[str]) -> InputUnusable:
    """The error for files of one table that differ."""
    return InputUnusable(
        f"{path} has other columns ({listed(names)}) than {first} ({listed(expected)}); all files of a "
        "dataset must have the same: make them alike, or name only those that belong together"
    )


class Gaps:
    """What becomes of rows in which a column has no value."""

    def __init__(self, options: PrepareOptions) -> None:
        self._drop = options.missing == "drop"
        self._fill = options.fill
        self._left_out = 0
        self._named: list[str] = []

    def without(self, batch: Batch) -> Batch:
        """The batch with values filled in, and without the rows that are left out."""
        columns = dict(batch.columns)
        for name in self._fill.keys() & columns.keys():
            columns[name] = _filled(columns[name], name, self._fill[name])
        batch = Batch(batch.file, columns, batch.row)
        if not self._drop:
            return batch
        missing = {name: _missing(column) for name, column in columns.items()}
        if not (gaps := np.logical_or.reduce(list(missing.values()))).any():
            return batch
        self._left_out += int(gaps.sum())
        for index in np.flatnonzero(gaps)[: NAMED_ROWS - len(self._named)]:
            name = next(name for name, mask in missing.items() if mask[index])
            self._named.append(f"{batch.row(int(index))} has no {name}")
        return batch.kept(~gaps)

    @property
    def notes(self) -> list[str]:
        if not self._left_out:
            return []
        more = "; and more" if self._left_out > len(self._named) else ""
        return [
            f"{self._left_out} rows with missing values are left out ({'; '.join(self._named)}{more}); "
            "--fill COLUMN=VALUE keeps them"
        ]


def _missing(column: Any) -> Array:
    nan_too = {"nan_is_null": True} if pa.types.is_floating(column.type) else {}
    mask: Array = pc.is_null(column, **nan_too).to_numpy(zero_copy_only=False)
    return mask


def _filled(column: Any, name: str, text: str) -> Any:
    try:
        value = pa.scalar(text).cast(column.type)
    except pa.ArrowException as exc:
        raise InputUnusable(f"--fill: {text!r} is no value for column {name!r} ({column.type})") from exc
    gaps = pa.array(_missing(column))
    return pc.if_else(gaps, value, column)


class TableSource:
    """A table's numbers, with text as ids and images decoded."""

    def __init__(self, table: Table, options: PrepareOptions) -> None:
        self._table = table
        self._names = needed(table.names, options)
        self._options = options
        self._gaps = Gaps(options)
        self._own_notes: list[str] = []
        self._decoders: dict[str, Decoder] = {}
        self.labels = {name: names for name, names in table.labels.items() if name in self._names}
        self._texts = [name for name in self._names if name in table.texts]
        self._refuse_types()
        # ids may have any type for whole numbers, but text is not to become an amount by a slip
        numeric = {name for name, dtype in options.dtypes.items() if dtype[0] not in "IU"}
        numeric |= set(options.scales) | set(options.shapes)
        members = {name for group in grouped(table.names, options).values() for name in group}
        for name in self._texts:
            if name in members or options.rename.get(name, name) in numeric:
                raise InputUnusable(
                    f"column {name!r} is text, and cannot be used as numbers; leave it out "
                    f"(--drop {quote(name)})"
                )
        if self._texts:
            self._collect()
        self._lengths = self._longest([name for name in self._names if name in options.pad])
        self._advise()

    @property
    def notes(self) -> list[str]:
        decoded = [note for decoder in self._decoders.values() for note in decoder.notes]
        return [*self._table.notes, *self._own_notes, *self._gaps.notes, *decoded]

    def _refuse_types(self) -> None:
        """All columns at once that can be nothing in a tensor."""
        odd = {
            name: self._table.types[name]
            for name in self._names
            if name in self._table.types
            and name not in self._texts
            and name not in self._table.images
            and not makes_tensor(self._table.types[name])
        }
        if odd:
            told = ", ".join(f"column {name!r} is of type {kind}" for name, kind in odd.items())
            drops = " ".join(f"--drop {quote(name)}" for name in odd)
            raise InputUnusable(
                f"{told}, which makes no tensor; leave out with {drops}, or convert to numbers first"
            )

    def _collect(self) -> None:
        seen: dict[str, set[str]] = {name: set() for name in self._texts}
        rows = 0
        # which rows are left out depends on all columns
        names = self._names if self._options.missing == "drop" else self._texts
        gaps = Gaps(self._options)
        for batch in self._table.batches(names):
            batch = gaps.without(batch)
            rows += batch.rows
            for name, values in seen.items():
                column = batch.columns[name]
                refuse_missing(column, name, batch.row)
                values.update(pc.unique(column).to_pylist())
                if len(values) > MAX_LABELS:
                    self._refuse_texts({name: f"more than {MAX_LABELS} different values"})
        several = {
            name: f"{len(values)} different values in {rows} rows"
            for name, values in seen.items()
            if len(values) > FEW_LABELS and len(values) > rows / 2
        }
        self._refuse_texts(several)
        for name, values in seen.items():
            self.labels[name] = tuple(sorted(values))
            if not rows:
                continue
            self._own_notes.append(
                f"column {name!r} is text; its {len(values)} different values became ids (see labels.json); "
                f"--drop {quote(name)} leaves it out"
            )

    def _refuse_texts(self, several: dict[str, str]) -> None:
        """Text that is no label is for a tokenizer, unless somebody has said which ids it is to become."""
        meant = {name for name in several if self._options.rename.get(name, name) in self._options.dtypes}
        several = {name: told for name, told in several.items() if name not in meant}
        if several:
            told = ", ".join(f"column {name!r} holds text with {how}" for name, how in several.items())
            first = next(iter(several))
            drops = " ".join(f"--drop {quote(name)}" for name in several)
            raise InputUnusable(
                f"{told}, too many for labels; give --tokenizer and --text-column {quote(first)} to train on "
                f"text, leave it out with {drops}, or have ids of it with "
                f"--dtype {quote(first)}=I64"
            )

    def _longest(self, names: list[str]) -> dict[str, int]:
        """Of columns that are padded, how long they become."""
        for name in names:
            if not is_list(self._table.types.get(name)):
                raise InputUnusable(f"--pad: column {name!r} has no lists")
        found = dict.fromkeys(names, 0)
        for batch in self._table.batches(names) if names else ():
            for name in names:
                found[name] = max(found[name], longest(batch.columns[name]))
        for name, length in found.items():
            self._own_notes.append(
                f"lists of column {name!r} are padded with {self._options.pad[name]:g} to {length} values, "
                "as the longest has"
            )
        return found

    def _advise(self) -> None:
        """How models of transformers call what the columns seem to be."""
        rename = self._options.rename
        made = {rename.get(name, name) for name in self._names}
        flags = []
        images = [name for name in self._names if name in self._table.images and name not in rename]
        if images and "pixel_values" not in made:
            flags.append(f"--rename {quote(images[0])}=pixel_values")
        if "labels" not in made:
            classes = [name for name in self._names if name in self._table.labels and name not in rename]
            found = ["label"] if "label" in self._names and "label" not in rename else classes
            flags += [f"--rename {quote(found[0])}=labels"] if len(found) == 1 else []
        if flags:
            self._own_notes.append(f"columns keep their names; most models want {' '.join(flags)}")

    def blocks(self) -> Iterator[Block]:
        ids = {name: pa.array(self.labels[name], pa.string()) for name in self._texts}
        if images := [name for name in self._names if name in self._table.images]:
            from hypha.data.sources.image_decoding import Decoder

            self._decoders = {name: Decoder(self._options, name) for name in images}
        for whole in self._table.batches(self._names):
            batch = self._gaps.without(whole)
            start = 0
            while start < batch.rows:
                # images are many times larger when they are decoded, by how much is known after the first
                step = min([batch.rows, *(decoder.rows_a_block for decoder in self._decoders.values())])
                yield self._block(batch.part(start, step), ids)
                start += step

    def _block(self, batch: Batch, ids: dict[str, Any]) -> Block:
        columns: dict[str, Array] = {}
        for name, column in batch.columns.items():
            if name in ids:
                refuse_missing(column, name, batch.row)
                found = pc.index_in(column.cast(pa.string()), ids[name])
                columns[name] = found.to_numpy(zero_copy_only=False).astype(np.int64)
            elif name in self._decoders:
                refuse_missing(column, name, batch.row)
                columns[name] = self._decoders[name].decode_all(_contents(column, name, batch))
            elif name in self._lengths:
                fill = self._options.pad[name]
                columns[name] = padded(column, name, batch.row, self._lengths[name], fill)
            else:
                columns[name] = to_array(column, name, batch.row)
        return Block(batch.row, columns)


def _contents(column: Any, name: str, batch: Batch) -> list[tuple[bytes | Path, str]]:
    found: list[tuple[bytes | Path, str]] = []
    for index, one in enumerate(column.to_pylist()):
        if isinstance(one, dict):
            content = one["bytes"] if one["bytes"] is not None else one["path"]
        else:
            content = one
        if content is None:
            raise InputUnusable(
                f"{batch.row(index)}: column {name!r} has neither an image nor a path; leave such rows out"
            )
        if isinstance(content, str):
            path = Path(batch.file).parent / content
            found.append((path, f"{batch.row(index)}, {path}"))
        else:
            found.append((content, f"{batch.row(index)}, column {name!r}"))
    return found

"""From what a source has to the columns of a dataset: grouped, chosen, renamed, scaled, shaped, cast.

Nothing is lost on the way without a message: a value that its dtype cannot hold is an error that names
the file and row.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from shlex import quote

import numpy as np

from hypha.data.options import PrepareOptions
from hypha.data.slices import DTYPES, Array, record_dtype
from hypha.errors import InputUnusable
from hypha.messages import Column

#: Sources yield blocks of about this size.
BLOCK_BYTES = 8 << 20

#: says where row ``i`` of some rows is, for people: rows and lines count from 1
RowName = Callable[[int], str]


@dataclass(frozen=True)
class Block:
    """Rows of a source: equally long arrays by column."""

    row: RowName
    columns: dict[str, Array]


def rows_from(file: str, start: int) -> RowName:
    """Of consecutive rows, the first of which is row ``start``, counted from 0."""
    return lambda index: f"{file}, row {start + index + 1}"


def rows_a_block(row_bytes: int) -> int:
    """How many rows of that size make a block."""
    return max(1, BLOCK_BYTES // max(1, row_bytes))


def grouped(names: Iterable[str], options: PrepareOptions) -> dict[str, list[str]]:
    """Which of the source's columns make each feature. Raises InputUnusable when a pattern matches none."""
    names = list(names)
    found: dict[str, list[str]] = {}
    for feature, patterns in options.features.items():
        found[feature] = []
        for pattern in patterns:
            matching = [pattern] if pattern in names else fnmatch.filter(names, pattern)
            if not matching:
                raise InputUnusable(
                    f"feature {feature!r}: no column is called {pattern!r}; there are {listed(names)}"
                )
            found[feature] += [name for name in matching if name not in found[feature]]
    return found


def needed(names: Iterable[str], options: PrepareOptions) -> list[str]:
    """The source's columns that are to be read, in its order. Raises InputUnusable for one that is
    not there.
    """
    names = list(names)
    groups = grouped(names, options)
    members = {member for group in groups.values() for member in group}
    for key, asked in (
        ("--column", options.columns),
        ("--drop", options.drop),
        ("--fill", options.fill),
        ("--pad", options.pad),
    ):
        for name in asked:
            if name not in names and (key != "--column" or name not in groups):
                raise InputUnusable(f"{key}: there is no column {name!r}; there are {listed(names)}")
    if options.columns:
        members = {member for one in options.columns if one in groups for member in groups[one]}
        names = [name for name in names if name in members or name in options.columns]
    names = [name for name in names if name not in options.drop]
    if not names:
        raise InputUnusable("no column is left; drop fewer")
    return names


def listed(names: Iterable[str]) -> str:
    """Names, as many as can be read."""
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


class Shaper:
    """Turns blocks into records; the first block decides the columns."""

    def __init__(self, options: PrepareOptions) -> None:
        self._options = options
        self.columns: tuple[Column, ...] = ()
        #: columns with large whole numbers that F32, which nobody asked for, cannot tell apart
        self.narrowed: set[str] = set()

    def records(self, block: Block) -> Array:
        """The rows of ``block`` as records of :attr:`columns`."""
        made = self._renamed(self._chosen(block), block)
        for name, factor in self._options.scales.items():
            made[name] = made[name].astype(np.float64) * factor
        for name, shape in self._options.shapes.items():
            made[name] = _shaped(name, made[name], shape, block)
        if not self.columns:
            self.columns = tuple(self._column(name, made[name], block) for name in sorted(made))
        rows = np.empty(len(next(iter(made.values()))), dtype=record_dtype(self.columns))
        for column in self.columns:
            values = made[column.name]
            if values.shape[1:] != column.shape:
                raise InputUnusable(
                    f"{block.row(0)}: {column.name!r} has the shape {list(values.shape[1:])} from here on, "
                    f"before it had {list(column.shape)}; all samples must have one shape"
                )
            rows[column.name] = made_values = cast(values, column, block)
            unasked = column.dtype == "F32" and column.name not in self._options.dtypes
            if unasked and ((made_values != values) & (values == np.rint(values))).any():
                self.narrowed.add(column.name)
        return rows

    def _chosen(self, block: Block) -> dict[str, Array]:
        options = self._options
        groups = grouped(block.columns, options)
        members = {member for group in groups.values() for member in group}
        values = {
            name: array
            for name, array in block.columns.items()
            if name not in members and name not in options.drop
        }
        for feature, group in groups.items():
            values[feature] = _joined(feature, group, block)
        if options.columns:
            values = {name: (block.columns | values)[name] for name in options.columns}
        return values

    def _renamed(self, values: dict[str, Array], block: Block) -> dict[str, Array]:
        rename = self._options.rename
        made: dict[str, Array] = {}
        for name, array in values.items():
            new = rename.get(name, name)
            if new in made:
                raise InputUnusable(
                    f"--rename: two columns would be called {new!r}; leave one out with --drop"
                )
            made[new] = array
        if unknown := sorted(set(rename) - set(values)):
            raise InputUnusable(f"rename: there is no column {unknown[0]!r}; there are {listed(values)}")
        for key in ("dtypes", "shapes", "scales"):
            if unknown := sorted(set(getattr(self._options, key)) - set(made)):
                raise InputUnusable(f"{key}: there is no column {unknown[0]!r}; there are {listed(made)}")
        if not made:
            raise InputUnusable(f"{block.row(0)} has no columns")
        return made

    def _column(self, name: str, values: Array, block: Block) -> Column:
        dtype = self._options.dtypes.get(name) or _natural_dtype(name, values, block)
        return Column(name=name, dtype=dtype, shape=values.shape[1:])


def _joined(feature: str, members: list[str], block: Block) -> Array:
    parts = []
    for name in members:
        values = block.columns[name]
        if values.ndim > 2:
            raise InputUnusable(
                f"{block.row(0)}: feature {feature!r} cannot take column {name!r} of shape "
                f"{list(values.shape[1:])}; only numbers and flat lists can be joined"
            )
        parts.append(values[:, None] if values.ndim == 1 else values)
    return np.concatenate(parts, axis=1)


def _shaped(name: str, values: Array, shape: tuple[int, ...], block: Block) -> Array:
    have = math.prod(values.shape[1:])
    if have != math.prod(shape):
        raise InputUnusable(
            f"{block.row(0)}: a sample of {name!r} has {have} values (shape {list(values.shape[1:])}), which "
            f"do not make the shape {list(shape)}"
        )
    return values.reshape(len(values), *shape)


def _natural_dtype(name: str, values: Array, block: Block) -> str:
    """The dtype when none is asked for."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "f":
        return "F16" if size == 2 else "F32"
    if kind == "i":
        return f"I{8 * size}"
    if kind == "u":
        return "U8" if size == 1 else "I64"
    if kind == "b":
        return "BOOL"
    raise InputUnusable(
        f"{block.row(0)}: column {name!r} holds {values.dtype}, no numbers; leave it out with "
        f"--drop {quote(name)}"
    )


def cast(values: Array, column: Column, block: Block) -> Array:
    """``values`` in the column's dtype. Raises InputUnusable naming the first row that does not fit."""
    if values.dtype.kind not in "fiub":
        _natural_dtype(column.name, values, block)
    if values.dtype.kind == "f":
        _refuse(~np.isfinite(values), "is NaN or infinite", values, column, block)
    target = np.dtype(DTYPES[column.dtype][0])
    if column.dtype == "BF16":
        return _bfloat16(values, column, block)
    if target.kind == "f":
        with np.errstate(over="ignore"):
            made = values.astype(target)
        _refuse(~np.isfinite(made), f"is too large for {column.dtype}", values, column, block)
        return made
    if values.dtype.kind == "f":
        _refuse(values != np.rint(values), f"is no whole number, as {column.dtype} is", values, column, block)
    if target.kind == "b":
        _refuse((values != 0) & (values != 1), "is neither 0 nor 1, as BOOL is", values, column, block)
    elif values.dtype.kind != "b":
        low, high = np.iinfo(target).min, np.iinfo(target).max
        # 2^63 as a float is not below it: float64 cannot tell it from the largest I64
        above = values >= float(high) if values.dtype.kind == "f" and target.itemsize == 8 else values > high
        _refuse((values < low) | above, f"is out of the range of {column.dtype}", values, column, block)
    return values.astype(target)


def _bfloat16(values: Array, column: Column, block: Block) -> Array:
    """Rounded to nearest, ties to even, as its bits."""
    with np.errstate(over="ignore"):
        bits = values.astype("<f4").view("<u4")
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    _refuse((rounded & 0x7F80) == 0x7F80, "is too large for BF16", values, column, block)
    return rounded


def _refuse(wrong: Array, why: str, values: Array, column: Column, block: Block) -> None:
    if not wrong.any():
        return
    row = int(np.argmax(wrong.reshape(len(wrong), -1).any(axis=1)))
    value = values[row][wrong[row]].flat[0] if values.ndim > 1 else values[row]
    raise InputUnusable(
        f"{block.row(row)}: {value} in column {column.name!r} {why}; correct it, choose another dtype "
        f"(--dtype {quote(column.name)}=...), or leave the column out (--drop)"
    )

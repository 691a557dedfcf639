"""From Arrow columns to arrays: numbers, booleans, and lists of one length (nested ones too)."""

from __future__ import annotations

from shlex import quote
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hypha.data.columns import RowName
from hypha.data.slices import Array
from hypha.errors import InputUnusable


def plain(column: Any) -> Any:
    """A column as one array, without dictionary encoding or extension types."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column


def storage_of(kind: Any) -> Any:
    """An Arrow type without extensions, which is how its values are kept."""
    return storage_of(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text, dictionary-encoded text included."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def makes_tensor(kind: Any) -> bool:
    """Whether values of an Arrow type are numbers, booleans, or lists of such."""
    kind = storage_of(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind):
        return makes_tensor(kind.value_type)
    return _is_number(kind) or bool(pa.types.is_decimal(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists; None is none."""
    return kind is not None and bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def refuse_missing(column: Any, name: str, row: RowName) -> None:
    """Raise InputUnusable at the first missing value."""
    if column.null_count:
        first = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputUnusable(
            f"{row(first)}: column {name!r} has no value; fill it in, or leave such rows out (--missing "
            f"drop), put a value there (--fill {quote(name)}=VALUE), or leave the column out "
            f"(--drop {quote(name)})"
        )


def to_array(column: Any, name: str, row: RowName) -> Array:
    """A column as an array of shape (rows, ...). Raises InputUnusable naming row and column."""
    column = plain(column)
    refuse_missing(column, name, row)
    kind = column.type
    if pa.types.is_decimal(kind):
        column, kind = column.cast(pa.float64()), pa.float64()
    if _is_number(kind):
        numbers: Array = column.to_numpy(zero_copy_only=False)
        return numbers
    if is_list(kind):
        return _lists(column, name, row)
    raise InputUnusable(
        f"column {name!r} is of type {kind}, which makes no tensor; leave it out with --drop {quote(name)}"
    )


def longest(column: Any) -> int:
    """How many values the longest list of a column has, 0 without any."""
    found = pc.max(pc.list_value_length(column)).as_py()
    return int(found or 0)


def padded(column: Any, name: str, row: RowName, length: int, value: float) -> Array:
    """A column of flat lists as an array of shape (rows, length), filled up with ``value`` at each end.
    Raises InputUnusable naming row and column.
    """
    refuse_missing(column, name, row)
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    flat = to_array(
        column.flatten(), name, lambda index: row(int(np.searchsorted(ends, index, side="right")))
    )
    if flat.ndim > 1:
        raise InputUnusable(f"{row(0)}: column {name!r} has lists in lists, which cannot be padded")
    if flat.dtype.kind in "iub" and value != round(value):
        raise InputUnusable(f"--pad: {value:g} is no value for column {name!r} of whole numbers")
    made = np.full((len(lengths), length), value, dtype=flat.dtype)
    made[np.arange(length) < lengths[:, None]] = flat
    return made


def _lists(column: Any, name: str, row: RowName) -> Array:
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    length = int(lengths[0])
    if (odd := np.flatnonzero(lengths != length)).size:
        first = int(odd[0])
        raise InputUnusable(
            f"{row(first)}: column {name!r} has a list of {int(lengths[first])} values, {row(0)} one of "
            f"{length}; all must be equally long: fill them up (--pad {quote(name)}=0), or leave the column "
            f"out (--drop {quote(name)})"
        )
    if not length:
        raise InputUnusable(
            f"{row(0)}: column {name!r} has an empty list; leave the column out (--drop {quote(name)})"
        )
    inner = to_array(column.flatten(), name, lambda index: row(index // length))
    return inner.reshape(len(column), length, *inner.shape[1:])

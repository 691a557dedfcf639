"""Numbers as people write them in tables: ``1234.5``, ``1234,5``, ``1,234.50``, ``1.234,50``, ``1 234,5``.

Whether a comma is a decimal one is decided column by column, by all its values; where a column could be read
both ways, as the table's other columns are, and that is told.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from shlex import quote
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hypha.data.sources.tables.tables import Batch
from hypha.errors import InputUnusable

#: Between thousands: what is no decimal sign, the Swiss apostrophes, and the spaces that do not break.
_OTHERS = "'\u2019 \u00a0\u202f"
_WHOLE = r"[1-9]\d{0,2}"
_PATTERNS = {
    ".": rf"^[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|{_WHOLE}([,{_OTHERS}]\d{{3}})+(\.\d+)?)$",
    ",": rf"^[+-]?((\d+,?\d*|,\d+)([eE][+-]?\d+)?|{_WHOLE}([.{_OTHERS}]\d{{3}})+(,\d+)?)$",
}
_BOTH = [re.compile(pattern) for pattern in _PATTERNS.values()]
_FRACTION = {".": r"[.eE]", ",": r"[,eE]"}
_THOUSANDS = {".": rf"[,{_OTHERS}]", ",": rf"[.{_OTHERS}]"}
#: What stands for a value that is missing, in a column of numbers (as pandas reads them).
MISSING = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "null", "None", "<NA>")


def looks_numeric(text: str) -> bool:
    """Whether that is a number, in whatever country."""
    return any(pattern.match(text) for pattern in _BOTH)


@dataclass(frozen=True)
class ColumnType:
    """How a column's text becomes values: an Arrow type and, of numbers, the decimal sign."""

    type: Any
    decimal: str = "."
    grouped: bool = False


@dataclass(frozen=True)
class _Found:
    """A value, and where it is; telling that may read the file."""

    value: str
    place: Callable[[], str]


def _first(batch: Batch, column: Any, present: Any, mask: Any) -> _Found | None:
    at = pc.index(mask, False).as_py()
    if at < 0:
        return None
    value = present[at].as_py()
    return _Found(value, functools.partial(batch.row, pc.index(column, value).as_py()))


def _example(values: Any, pattern: str) -> str:
    found = values.filter(pc.match_substring_regex(values, pattern))
    return str(found[0].as_py()) if len(found) else ""


class ColumnKind:
    """What a column of text is: the narrowest of whole numbers, numbers and text that fits all rows."""

    def __init__(self, name: str, text: bool = False) -> None:
        self.name = name
        #: whether there is any value
        self.present = False
        self._viable = {".": not text, ",": not text}
        self._fraction = {".": False, ",": False}
        self._wide = False
        self._numbers = 0
        self._rows = 0
        self._text = text
        #: the first value that is no number, and those that are none with one decimal sign
        self._odd: _Found | None = None
        self._other: dict[str, _Found] = {}
        #: a value that has a decimal sign, and those with something between thousands
        self._example = ""
        self._thousands = {".": "", ",": ""}

    def see(self, batch: Batch) -> None:
        """Take note of some rows, whose values are text without spaces around."""
        column = batch.columns[self.name]
        absent = pc.is_in(column, pa.array(MISSING, pa.string()))
        present = column.filter(pc.invert(absent))
        if not len(present):
            return
        self.present = True
        self._rows += len(present)
        if self._text:
            return
        # what most columns of numbers come to, and far quicker than patterns
        pointed = self._viable["."] and not self._viable[","] and self._fraction["."]
        for kind in [pa.float64(), pa.int64()] if pointed else [pa.int64()]:
            with contextlib.suppress(pa.ArrowInvalid):
                pc.cast(present, kind)
                self._numbers += len(present)
                return
        matches = {sign: pc.match_substring_regex(present, pattern) for sign, pattern in _PATTERNS.items()}
        either = pc.or_(*matches.values())
        self._numbers += pc.sum(either).as_py()
        self._odd = self._odd or _first(batch, column, present, either)
        numbers = present.filter(either)
        for sign, found in matches.items():
            self._viable[sign] &= bool(pc.all(found).as_py())
            if sign not in self._other and (odd := _first(batch, column, present, found)) is not None:
                self._other[sign] = odd
            self._fraction[sign] |= bool(pc.any(pc.match_substring_regex(numbers, _FRACTION[sign])).as_py())
            self._thousands[sign] = self._thousands[sign] or _example(numbers, _THOUSANDS[sign])
        self._wide |= bool(pc.any(pc.match_substring_regex(numbers, r"\d{19}")).as_py())
        self._example = self._example or _example(numbers, r"[.,]")

    @property
    def evidence(self) -> str | None:
        """The only decimal sign with which the column's values are numbers, if it is only one."""
        signs = [sign for sign, viable in self._viable.items() if viable]
        return signs[0] if len(signs) == 1 and self.present and self._example else None

    @property
    def ambiguous(self) -> bool:
        """Whether both signs would do, and give different numbers."""
        return all(self._viable.values()) and bool(self._example)

    @property
    def has_comma(self) -> bool:
        return "," in self._example

    def result(self, decimal: str) -> ColumnType:
        """Its type, ``decimal`` being the sign where both would do. Raises InputUnusable where most values
        are numbers and some are not.
        """
        if self.present and not self._text:
            sign = decimal if self._viable[decimal] else next((s for s in _PATTERNS if self._viable[s]), None)
            if sign is not None:
                whole = not self._fraction[sign] and not self._wide
                grouped = bool(self._thousands[sign]) or sign == ","
                return ColumnType(pa.int64() if whole else pa.float64(), sign, grouped)
            if self._numbers > self._rows / 2:
                odd = self._odd or self._other[decimal]
                which = "" if self._odd else ", with another decimal sign than others"
                raise InputUnusable(
                    f"column {self.name!r} holds numbers, but {odd.place()} holds {odd.value!r}{which}; "
                    f"correct that value, or leave the column out (--drop {quote(self.name)})"
                )
        return ColumnType(pa.string())

    def grouping(self, decimal: str) -> str | None:
        """How a value with something between thousands is read, for people, if there is one."""
        example = self._thousands[decimal]
        return (
            f"{example} in column {self.name!r} is read as {to_number(example, decimal)}" if example else None
        )

    def reading(self, decimal: str) -> str:
        other = "," if decimal == "." else "."
        read = {sign: to_number(self._example, sign) for sign in (decimal, other)}
        return (
            f"{self._example} in column {self.name!r} is read as {read[decimal]}; --decimal {other} makes it "
            f"{read[other]}"
        )


def to_number(text: str, decimal: str) -> str:
    """A number as Python writes it."""
    return re.sub(_THOUSANDS[decimal], "", text).replace(",", ".")


def convert(column: Any, kind: ColumnType) -> Any:
    """A column of text as values of its type, missing ones as nulls. Raises pa.ArrowInvalid."""
    if pa.types.is_string(kind.type):
        return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    absent = pc.is_in(column, pa.array(MISSING, pa.string()))
    column = pc.if_else(absent, pa.scalar(None, pa.string()), column)
    if kind.grouped:
        column = pc.replace_substring_regex(column, _THOUSANDS[kind.decimal], "")
        column = pc.replace_substring(column, ",", ".")
    return pc.cast(pc.replace_substring_regex(column, r"^\+", ""), kind.type)

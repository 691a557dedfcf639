"""How a CSV file is written: its encoding, its delimiter, the names of its columns.

Spreadsheets write what their country is used to. Of the delimiters, that one is right which gives all rows
the same number of fields, and the most numbers.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hypha.data.columns import listed
from hypha.data.options import PrepareOptions
from hypha.data.sources.reading import BROKEN, data_suffix, encoding_of, head_of, not_in_encoding, open_text
from hypha.data.sources.tables.csv_numbers import looks_numeric
from hypha.errors import InputUnusable

DELIMITERS = (",", ";", "\t", "|")
_NAMES = {",": "a comma", ";": "a semicolon (;)", "\t": "a tab", "|": "a pipe (|)", " ": "a space"}
_SAMPLE_RECORDS = 500
#: A field may be a whole text; Python's reader of CSV refuses more than this, 128 KiB if not told otherwise.
_FIELD_BYTES = 64 << 20


@dataclass(frozen=True)
class Dialect:
    """``names`` are those of the columns, ``leading`` lines come before the header, ``notes`` tell of
    guesses.
    """

    delimiter: str
    encoding: str
    names: tuple[str, ...]
    leading: int
    notes: tuple[str, ...] = ()
    #: whether blanks stand before quotation marks, which pyarrow does not know
    spaced: bool = False


def find_dialect(path: Path, options: PrepareOptions) -> Dialect:
    """Raises InputUnusable naming the file (and line), ConfigError."""
    head, whole = head_of(path)
    encoding = encoding_of(head, options.encoding)
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=whole)
    except UnicodeDecodeError as exc:
        raise not_in_encoding(path, options.encoding) from exc
    if "\0" in text:
        raise not_in_encoding(path, options.encoding)
    leading = 0
    delimiter = options.field_delimiter
    notes = []
    first = text.split("\n", 1)[0].rstrip("\r")
    if len(first) == 5 and first.lower().startswith("sep="):
        # how a spreadsheet tells another one; none writes it into the table
        leading, text = 1, text.split("\n", 1)[1] if "\n" in text else ""
        delimiter = delimiter or first[-1]
    if not text.strip():
        raise InputUnusable(f"{path} is empty; take it out, or put a table into it")
    usual = {".tsv": "\t", ".tab": "\t", ".psv": "|"}.get(data_suffix(path), ",")
    guessed = delimiter is None
    if delimiter is None:
        delimiter = _sniff(text, whole, usual, options.csv_header)
    rows = _records(text, delimiter, whole)
    if not rows:
        raise InputUnusable(f"{path}, line 1: the header is no line of CSV; is a quotation mark missing?")
    names, told = _names(path, rows[0], options.csv_header)
    if guessed and len(names) == 1:
        notes.append(f"{path.name}: no delimiter is found, it has one column; --delimiter gives one")
    elif guessed and delimiter != usual:
        sign = _NAMES[delimiter]
        notes.append(f"{path.name}: the delimiter is {sign}, by its content; --delimiter gives another")
    spaced = re.search(rf'(^|{re.escape(delimiter)}) +"', text, re.MULTILINE) is not None
    return Dialect(delimiter, encoding, names, leading, tuple(notes + told), spaced)


def _names(path: Path, row: list[str], header: bool) -> tuple[tuple[str, ...], list[str]]:
    if not header:
        return tuple(f"f{number}" for number in range(len(row))), []
    names = [name.strip() for name in row]
    if all(looks_numeric(name) for name in names):
        raise InputUnusable(
            f"{path}: its first line holds numbers ({listed(names)}), no names of columns; add such a line, "
            "or give --no-header"
        )
    notes = []
    for number, name in enumerate(names):
        if not name:
            names[number] = f"unnamed{number}"
            notes.append(
                f"{path.name}: column {number + 1} has no name, it is called {names[number]}; --drop "
                f"{names[number]} leaves it out"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputUnusable(f"{path}: two columns are called {twice!r}; each needs a name of its own")
    return tuple(names), notes


def _records(text: str, delimiter: str, whole: bool) -> list[list[str]]:
    """The first records that are no empty lines, as far as they can be read; whole ones only."""
    found = []
    csv.field_size_limit(_FIELD_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        found = [row for row in islice(reader, _SAMPLE_RECORDS + 1) if row]
    except csv.Error:
        return found
    if not whole and len(found) <= _SAMPLE_RECORDS and len(found) > 1:
        found.pop()
    return found[:_SAMPLE_RECORDS]


def _sniff(text: str, whole: bool, usual: str, header: bool) -> str:
    best = (0.0, False, 0)
    chosen = None
    # a header with a delimiter is no single name, however odd the lines below
    nearly = (0.0 if header else 0.5, "")
    for delimiter in DELIMITERS:
        rows = _records(text, delimiter, whole)
        if not rows or len(rows[0]) < 2:
            continue
        fitting = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        if fitting == 1:
            cells = [cell for row in rows[1:] or rows for cell in row]
            numeric = sum(looks_numeric(cell.strip()) for cell in cells) / len(cells)
            if (mark := (numeric, delimiter == usual, len(rows[0]))) > best:
                best, chosen = mark, delimiter
        elif fitting > nearly[0]:
            # some line is wrong: it is told as such, with this delimiter
            nearly = (fitting, delimiter)
    if chosen is None and not nearly[1]:
        # one column: nothing may stand between its fields
        once = [
            one for one in (usual, *DELIMITERS) if all(len(row) == 1 for row in _records(text, one, whole))
        ]
        return once[0] if once else usual
    return chosen or nearly[1]


class Rewritten(io.RawIOBase):
    """A CSV file in UTF-8 without blanks before its fields. Reading raises as :func:`open_text` does."""

    def __init__(self, file: io.TextIOWrapper, dialect: Dialect) -> None:
        self._parts = _rewritten(file, dialect)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left and (part := next(self._parts, None)) is not None:
            self._left = part
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _rewritten(file: io.TextIOWrapper, dialect: Dialect) -> Iterator[bytes]:
    for _ in range(dialect.leading):
        yield file.readline().encode()
    reader = csv.reader(file, delimiter=dialect.delimiter, skipinitialspace=True)
    while rows := list(islice(reader, _SAMPLE_RECORDS)):
        written = io.StringIO(newline="")
        csv.writer(written, delimiter=dialect.delimiter).writerows(rows)
        yield written.getvalue().encode()


@contextlib.contextmanager
def _reader(path: Path, dialect: Dialect, strict: bool = False) -> Iterator[Any]:
    """Of a file's records; its ``line_num`` leaves out the leading lines."""
    with open_text(path, dialect.encoding) as file:
        for _ in range(dialect.leading):
            file.readline()
        yield csv.reader(file, delimiter=dialect.delimiter, skipinitialspace=True, strict=strict)


def line_of(path: Path, dialect: Dialect, header: bool, row: int) -> int | None:
    """The line on which row ``row`` begins, both counted from 1; None when that cannot be told. Reads the
    file.
    """
    wanted = row + (1 if header else 0)
    try:
        with _reader(path, dialect) as reader:
            while True:
                before: int = reader.line_num
                if next(reader):
                    wanted -= 1
                if not wanted:
                    return before + 1 + dialect.leading
    except (*BROKEN, csv.Error, UnicodeDecodeError, StopIteration):
        return None


def unclosed(path: Path, dialect: Dialect) -> str | None:
    """What is wrong where a quotation mark is never closed, so that the file's rest would be one field. Reads
    the file.
    """
    start = 0
    try:
        with _reader(path, dialect, strict=True) as reader:
            for _ in reader:
                start = reader.line_num
    except csv.Error as exc:
        if "unexpected end of data" in str(exc):
            return (
                f"{path}, line {start + 1 + dialect.leading}: a quotation mark is opened here and not closed "
                "up to the end of the file; correct that line"
            )
    except (*BROKEN, UnicodeDecodeError):
        pass
    return None


def odd_line(path: Path, dialect: Dialect) -> str | None:
    """What is wrong with the first record that has more or fewer fields than there are columns. Reads the
    file.
    """
    before = 0
    try:
        with _reader(path, dialect) as reader:
            for fields in reader:
                if fields and len(fields) != len(dialect.names):
                    return (
                        f"{path}, line {before + 1 + dialect.leading}: it has {len(fields)} fields, the "
                        f"first line {len(dialect.names)} ({listed(dialect.names)}); the delimiter is "
                        f"{_NAMES.get(dialect.delimiter, dialect.delimiter)}. Correct that line, or give "
                        "--delimiter"
                    )
                before = reader.line_num
    except (*BROKEN, csv.Error, UnicodeDecodeError):
        pass
    return None

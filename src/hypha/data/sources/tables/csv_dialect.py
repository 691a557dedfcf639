"""How a CSV file is written: its encoding, its delimiter, the names of its columns.

Spreadsheets write what their country is used to. Of the delimiters, that one is right which gives all rows
the same number of fields, and the most numbers.
"""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hypha.data.columns import listed
from hypha.data.options import PrepareOptions
from hypha.data.sources.reading import data_suffix, encoding_of, head_of, not_in_encoding
from hypha.data.sources.tables.csv_numbers import looks_numeric
from hypha.errors import InputUnusable

DELIMITERS = (",", ";", "\t", "|")
DELIMITER_NAMES = {",": "a comma", ";": "a semicolon (;)", "\t": "a tab", "|": "a pipe (|)", " ": "a space"}
_SAMPLE_RECORDS = 500


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
        sign = DELIMITER_NAMES[delimiter]
        notes.append(f"{path.name}: the delimiter is {sign}, by its content; --delimiter gives another")
    return Dialect(delimiter, encoding, names, leading, tuple(notes + told))


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
    csv.field_size_limit(len(text))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        found = [row for row in islice(reader, _SAMPLE_RECORDS + 1) if row]
    except csv.Error:
        return []
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

"""JSON lines as a table, and JSON files that hold one list: an object a row. Every file is read twice,
first to see which type each column has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import msgspec
import pyarrow as pa

from hypha.data.columns import RowName, listed
from hypha.data.options import PrepareOptions
from hypha.data.sources.reading import open_text
from hypha.data.sources.tables.tables import Batch, Table
from hypha.decoding import decode
from hypha.errors import InputUnusable, Undecodable

BLOCK_CHARACTERS = 4 << 20
#: objects, the line of each
Rows = tuple[list[dict[str, Any]], list[int]]


class JsonTable(Table):
    def __init__(self, files: list[Path], options: PrepareOptions) -> None:
        self._files = files
        self._options = options
        types = self._find_types()
        super().__init__(types, types)

    def batches(self, names: list[str]) -> Iterator[Batch]:
        for path in self._files:
            for rows, lines in self._read(path):
                columns = {}
                for name in names:
                    try:
                        columns[name] = pa.array([row.get(name) for row in rows], self.types[name])
                    except (pa.ArrowException, OverflowError) as exc:
                        raise InputUnusable(f"{path} changed while it was read: {exc}") from exc
                yield Batch(str(path), columns, _lines(path, lines))

    def _find_types(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in self._files:
            for rows, lines in self._read(path):
                place = _lines(path, lines)
                for name in dict.fromkeys(name for row in rows for name in row):
                    kind = _type_of([row.get(name) for row in rows], name, place)
                    known = found.get(name, pa.null())
                    try:
                        found[name] = pa.unify_schemas(
                            [pa.schema([(name, known)]), pa.schema([(name, kind)])],
                            promote_options="permissive",
                        )[0].type
                    except pa.ArrowException as exc:
                        raise InputUnusable(
                            f"{place(0)}: column {name!r} holds {kind} from here on, before it was {known}; "
                            f"make them alike, or leave the column out (--drop {quote(name)})"
                        ) from exc
        if not found:
            raise InputUnusable(
                f"{listed(map(str, self._files))} holds no rows; put objects with values into it"
            )
        return found

    def _read(self, path: Path) -> Iterator[Rows]:
        with open_text(path, self._options.encoding) as file:
            line, first = 1, file.read(1)
            while first.isspace():
                line += first == "\n"
                first = file.read(1)
            if first == "[":
                yield from _of_list(path, first + file.read())
            elif first:
                yield from _of_lines(path, first, file, line)


def _decoded(text: str) -> Any:
    """Raises Undecodable."""
    try:
        return decode(msgspec.json.decode, text)
    except Undecodable:
        # Python writes NaN, which is no JSON
        try:
            return decode(json.loads, text)
        except Undecodable:
            pass
        raise


def _of_list(path: Path, text: str) -> Iterator[Rows]:
    try:
        rows = _decoded(text)
    except Undecodable as exc:
        raise InputUnusable(f"{path} is no JSON: {exc}; correct it") from exc
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputUnusable(f"{path}: element {number} is no object with columns; write one a row")
    if rows:
        yield rows, list(range(1, len(rows) + 1))


def _of_lines(path: Path, first: str, file: Any, line: int) -> Iterator[Rows]:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    held = 0
    pending = first
    for number, text in enumerate(file, line):
        text, pending = pending + text, ""
        held += len(text)
        if not text.strip():
            continue
        try:
            row = _decoded(text)
        except Undecodable as exc:
            raise InputUnusable(
                f"{path}, line {number}: it is no JSON ({exc}); each line holds one object, such as "
                '{"text": "...", "label": 1}'
            ) from exc
        if not isinstance(row, dict):
            raise InputUnusable(f"{path}, line {number}: it is no object with columns; write one a line")
        rows.append(row)
        lines.append(number)
        if held >= BLOCK_CHARACTERS:
            yield rows, lines
            rows, lines, held = [], [], 0
    if rows:
        yield rows, lines


def _lines(path: Path, lines: list[int]) -> RowName:
    return lambda index: f"{path}, line {lines[index]}"


def _type_of(values: list[Any], name: str, place: RowName) -> Any:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError) as exc:
        present = [(index, value) for index, value in enumerate(values) if value is not None]
        first = present[0][1]
        odd = next((one for one in present if _class(one[1]) is not _class(first)), present[0])
        raise InputUnusable(
            f"{place(odd[0])}: column {name!r} holds {_shown(odd[1])}, {place(present[0][0])} "
            f"{_shown(first)}; make them alike, or leave the column out (--drop {quote(name)})"
        ) from exc


def _class(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 40 else text[:37] + "..."

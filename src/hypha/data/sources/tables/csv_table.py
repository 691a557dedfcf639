"""CSV files as a table. Every file is read twice: first to see which columns are whole numbers, numbers or
text throughout.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.compute as pc

from hypha.data.columns import listed
from hypha.data.options import PrepareOptions
from hypha.data.sources.reading import open_text
from hypha.data.sources.tables.csv_dialect import DELIMITER_NAMES, Dialect, find_dialect
from hypha.data.sources.tables.csv_numbers import ColumnKind, ColumnType, convert
from hypha.data.sources.tables.tables import Batch, Table, other_columns
from hypha.errors import InputUnusable

#: Of the rows that are read at a time, and of a field: a missing quotation mark is found soon.
BLOCK_CHARACTERS = 4 << 20
#: Read after a file's last line: whatever comes together with it is in a quotation that was never closed.
_END = "\0"


class CsvTable(Table):
    """See the module. ``texts_only`` are columns that are text, whatever they look like."""

    def __init__(
        self, files: list[Path], options: PrepareOptions, texts_only: frozenset[str] = frozenset()
    ) -> None:
        self._files = files
        self._options = options
        self._texts_only = texts_only
        self._dialects = {path: find_dialect(path, options) for path in files}
        first = self._dialects[files[0]].names
        for path in files[1:]:
            if sorted(other := self._dialects[path].names) != sorted(first):
                raise other_columns(path, list(other), files[0], list(first))
        self._notes = _notes(list(self._dialects.values()))
        #: of columns that are no use, where somebody wants them
        self._odd: dict[str, InputUnusable] = {}
        kinds = self._looked_at(list(first))
        self._kinds = self._decided(kinds)
        types = {name: kind.type for name, kind in self._kinds.items()}
        super().__init__((kind.name for kind in kinds), types, self._notes)

    def batches(self, names: list[str]) -> Iterator[Batch]:
        if (odd := next((name for name in names if name in self._odd), None)) is not None:
            raise self._odd[odd]
        for batch in self._read(names):
            columns = {}
            for name, column in batch.columns.items():
                try:
                    columns[name] = convert(column, self._kinds[name])
                except pa.ArrowInvalid as exc:
                    raise InputUnusable(f"{batch.file} changed while it was read: {exc}") from exc
            yield Batch(batch.file, columns, batch.row)

    def _read(self, names: list[str]) -> Iterator[Batch]:
        """These columns as text, without spaces around."""
        for path in self._files:
            places = {name: self._dialects[path].names.index(name) for name in names}
            start = held = 0
            lines: list[int] = []
            rows: list[list[str]] = []
            for line, fields in self._records(path):
                lines.append(line)
                rows.append(fields)
                held += sum(map(len, fields))
                if held >= BLOCK_CHARACTERS:
                    yield _batch(path, start, lines, rows, places)
                    start, held, lines, rows = start + len(rows), 0, [], []
            if rows:
                yield _batch(path, start, lines, rows, places)

    def _records(self, path: Path) -> Iterator[tuple[int, list[str]]]:
        """The fields of each row, and the line on which it begins. Raises InputUnusable."""
        dialect = self._dialects[path]
        line, header, at_end = dialect.leading + 1, self._options.csv_header, False

        def lines(file: TextIO) -> Iterator[str]:
            nonlocal at_end
            yield from islice(file, dialect.leading, None)
            at_end = True
            yield _END

        csv.field_size_limit(BLOCK_CHARACTERS)
        with open_text(path, dialect.encoding) as file:
            reader = csv.reader(lines(file), delimiter=dialect.delimiter, skipinitialspace=True)
            try:
                for fields in reader:
                    begins, line = line, dialect.leading + reader.line_num + 1
                    if at_end and fields != [_END]:
                        raise InputUnusable(
                            f"{path}, line {begins}: a quotation mark is opened here and not closed up to "
                            "the end of the file; correct that line"
                        )
                    if at_end or not fields:
                        continue
                    if len(fields) != len(dialect.names):
                        raise InputUnusable(
                            f"{path}, line {begins}: it has {len(fields)} fields, the first line "
                            f"{len(dialect.names)} ({listed(dialect.names)}); the delimiter is "
                            f"{DELIMITER_NAMES.get(dialect.delimiter, dialect.delimiter)}. Correct that "
                            "line, or give --delimiter"
                        )
                    if not header:
                        yield begins, fields
                    header = False
            except csv.Error as exc:
                raise InputUnusable(
                    f"{path}, line {line}: {exc}; is a quotation mark missing? Longer texts are better kept "
                    "in Parquet or .jsonl files"
                ) from exc

    def _looked_at(self, names: list[str]) -> list[ColumnKind]:
        kinds = [ColumnKind(name, name in self._texts_only) for name in names]
        rows = 0
        for batch in self._read(names):
            rows += batch.rows
            for kind in kinds:
                kind.see(batch)
        # a delimiter at the end of each line makes such a column
        empty = [one for one in kinds if rows and not one.present and one.name.startswith("unnamed")]
        for kind in empty:
            self._notes = [note for note in self._notes if kind.name not in note]
            self._notes.append(f"the column {kind.name} has neither a name nor any value; it is left out")
        return [kind for kind in kinds if kind not in empty]

    def _decided(self, kinds: list[ColumnKind]) -> dict[str, ColumnType]:
        asked = self._options.decimal
        evidence = {kind.evidence for kind in kinds if kind.evidence is not None}
        shared: str | None = asked or (next(iter(evidence)) if len(evidence) == 1 else None)
        delimiter = self._dialects[self._files[0]].delimiter
        found = {}
        commas = []
        for kind in kinds:
            decimal = shared or ("," if delimiter != "," and kind.has_comma else ".")
            try:
                found[kind.name] = made = kind.result(decimal)
            except InputUnusable as exc:
                # of no interest where nobody wants the column
                self._odd[kind.name] = exc
                continue
            if pa.types.is_string(made.type) or kind.name in self._options.drop:
                continue
            if kind.ambiguous and asked is None:
                self._notes.append(kind.reading(made.decimal))
            elif (grouping := kind.grouping(made.decimal)) is not None:
                self._notes.append(f"{grouping}, by the column's values")
            elif made.decimal == "," and asked is None and kind.evidence:
                commas.append(kind.name)
            if asked is not None and kind.evidence and kind.evidence != asked:
                self._notes.append(
                    f"column {kind.name!r} cannot be read with --decimal {asked}; it has the other sign"
                )
        if commas:
            self._notes.append(
                f"columns {listed(commas)} have decimal commas, by their values; --decimal . reads points "
                "only"
            )
        return found


def _batch(
    path: Path, start: int, lines: list[int], rows: list[list[str]], places: Mapping[str, int]
) -> Batch:
    values = list(zip(*rows, strict=True))
    columns = {
        name: pc.utf8_trim_whitespace(pa.array(values[place], pa.string())) for name, place in places.items()
    }
    return Batch(str(path), columns, lambda index: f"{path}, row {start + index + 1} (line {lines[index]})")


def _notes(dialects: list[Dialect]) -> list[str]:
    """Each note once, though every file may give it."""
    seen: dict[str, str] = {}
    for dialect in dialects:
        for note in dialect.notes:
            seen.setdefault(note.split(": ", 1)[1], note)
    return list(seen.values())

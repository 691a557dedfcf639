"""CSV files as a table. Every file is read twice: first to see which columns are whole numbers, numbers or
text throughout.
"""

from __future__ import annotations

import contextlib
import csv
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from hypha.data.columns import listed
from hypha.data.options import PrepareOptions
from hypha.data.sources.reading import BROKEN, is_compressed, not_in_encoding, open_data, open_text
from hypha.data.sources.tables.csv_dialect import (
    Dialect,
    Rewritten,
    find_dialect,
    line_of,
    odd_line,
    unclosed,
)
from hypha.data.sources.tables.csv_numbers import ColumnKind, ColumnType, convert
from hypha.data.sources.tables.tables import Batch, other_columns
from hypha.errors import InputUnusable

CSV_BLOCK_BYTES = 4 << 20


class CsvTable:
    """See the module. ``texts_only`` are columns that are text, whatever they look like."""

    labels: Mapping[str, tuple[str, ...]] = {}
    images: frozenset[str] = frozenset()
    types: Mapping[str, Any] = {}

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
        self.notes: list[str] = _notes(list(self._dialects.values()))
        #: of columns that are no use, where somebody wants them
        self._odd: dict[str, InputUnusable] = {}
        kinds = self._looked_at(list(first))
        self.names = [kind.name for kind in kinds]
        self._types = self._decided(kinds)
        self.texts = frozenset(name for name, kind in self._types.items() if kind.type == pa.string())

    def batches(self, names: list[str]) -> Iterator[Batch]:
        if (odd := next((name for name in names if name in self._odd), None)) is not None:
            raise self._odd[odd]
        for batch in self._read(names):
            columns = {}
            for name, column in batch.columns.items():
                try:
                    columns[name] = convert(column, self._types[name])
                except pa.ArrowInvalid as exc:
                    raise InputUnusable(f"{batch.file} changed while it was read: {exc}") from exc
            yield Batch(batch.file, columns, batch.row)

    def _read(self, names: list[str]) -> Iterator[Batch]:
        """All columns as text, without spaces around."""
        for path in self._files:
            yield from self._read_file(path, self._dialects[path], names)

    def _read_file(self, path: Path, dialect: Dialect, names: list[str]) -> Iterator[Batch]:
        header = self._options.csv_header
        start = 0

        def row(first: int, index: int) -> str:
            number = first + index + 1
            line = line_of(path, dialect, header, number)
            return f"{path}, row {number}" + (f" (line {line})" if line is not None else "")

        try:
            with contextlib.ExitStack() as stack:
                file: Any = path  # which pyarrow reads in its own threads
                encoding = "utf8" if dialect.encoding.startswith("utf-8") else dialect.encoding
                if dialect.spaced:
                    text = stack.enter_context(open_text(path, dialect.encoding))
                    file, encoding = Rewritten(text, dialect), "utf8"
                elif is_compressed(path):
                    file = stack.enter_context(open_data(path))
                reader = pyarrow.csv.open_csv(
                    file,
                    read_options=pyarrow.csv.ReadOptions(
                        use_threads=False,
                        block_size=CSV_BLOCK_BYTES,
                        column_names=dialect.names,
                        skip_rows=dialect.leading,
                        skip_rows_after_names=1 if header else 0,
                        encoding=encoding,
                    ),
                    parse_options=pyarrow.csv.ParseOptions(
                        delimiter=dialect.delimiter, newlines_in_values=True
                    ),
                    convert_options=pyarrow.csv.ConvertOptions(
                        column_types=dict.fromkeys(names, pa.string()),
                        include_columns=names,
                        strings_can_be_null=False,
                    ),
                )
                with reader:
                    for part in reader:
                        if part.num_rows:
                            columns = {
                                name: pc.utf8_trim_whitespace(column)
                                for name, column in zip(names, part.columns, strict=True)
                            }
                            yield Batch(str(path), columns, functools.partial(row, start))
                        start += part.num_rows
        except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error, *BROKEN) as exc:
            raise self._unreadable(path, dialect, start, exc) from exc

    def _unreadable(self, path: Path, dialect: Dialect, start: int, exc: Exception) -> InputUnusable:
        message = str(exc)
        if isinstance(exc, UnicodeDecodeError) or "UTF8" in message:
            return not_in_encoding(path, self._options.encoding)
        if "straddling" in message:
            return InputUnusable(
                f"{path}, after row {start}: a row is longer than {CSV_BLOCK_BYTES >> 20} MiB; is a "
                "quotation mark missing? Longer texts are better kept in Parquet or .jsonl files"
            )
        if message.startswith("Empty CSV file"):
            return InputUnusable(f"{path} has no rows below its header; take it out, or put rows into it")
        odd = odd_line(path, dialect) if isinstance(exc, pa.ArrowInvalid) else None
        return InputUnusable(
            odd or f"{path}, after row {start}: {message.splitlines()[0]}; is the file whole?"
        )

    def _looked_at(self, names: list[str]) -> list[ColumnKind]:
        for path, dialect in self._dialects.items():
            if _odd_quotes(path) and (wrong := unclosed(path, dialect)) is not None:
                raise InputUnusable(wrong)
        kinds = [ColumnKind(name, name in self._texts_only) for name in names]
        rows = 0
        for batch in self._read(names):
            rows += batch.rows
            for kind in kinds:
                kind.see(batch)
        # a delimiter at the end of each line makes such a column
        empty = [one for one in kinds if rows and not one.present and one.name.startswith("unnamed")]
        for kind in empty:
            self.notes = [note for note in self.notes if kind.name not in note]
            self.notes.append(f"the column {kind.name} has neither a name nor any value; it is left out")
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
                self.notes.append(kind.reading(made.decimal))
            elif (grouping := kind.grouping(made.decimal)) is not None:
                self.notes.append(f"{grouping}, by the column's values")
            elif made.decimal == "," and asked is None and kind.evidence:
                commas.append(kind.name)
            if asked is not None and kind.evidence and kind.evidence != asked:
                self.notes.append(
                    f"column {kind.name!r} cannot be read with --decimal {asked}; it has the other sign"
                )
        if commas:
            self.notes.append(
                f"columns {listed(commas)} have decimal commas, by their values; --decimal . reads points "
                "only"
            )
        return found


def _odd_quotes(path: Path) -> bool:
    """Whether the number of quotation marks is odd, as it is when one is missing."""
    count = 0
    try:
        with open_data(path) as file:
            while block := file.read(CSV_BLOCK_BYTES):
                count += block.count(b'"')
    except BROKEN as exc:
        raise InputUnusable(f"{path} cannot be read: {exc}; is it whole?") from exc
    return count % 2 == 1


def _notes(dialects: list[Dialect]) -> list[str]:
    """Each note once, though every file may give it."""
    seen: dict[str, str] = {}
    for dialect in dialects:
        for note in dialect.notes:
            seen.setdefault(note.split(": ", 1)[1], note)
    return list(seen.values())

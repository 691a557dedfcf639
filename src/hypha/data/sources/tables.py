"""Tables as sources: CSV, Parquet, and datasets saved by the Hugging Face library.

Text in a table becomes ids, in the order of the sorted different values; a first pass collects them. All
files of a table must have the same columns. Blocks are read one by one, so tables of any size will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from hypha.data.columns import Block, grouped, listed, needed, rows_a_block
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
from hypha.data.sources.arrow_columns import RowName, is_text, plain, refuse_missing, to_array
from hypha.errors import ConfigError, InputUnusable, Problem

#: A column of text with more different values than this is not meant as labels.
MAX_LABELS = 10_000
CSV_BLOCK_BYTES = 4 << 20
#: Rows read at a time, before their size is known to ask for fewer.
MAX_ROWS = 8192


@dataclass(frozen=True)
class Batch:
    """Some rows of a table."""

    file: str
    start: int
    columns: dict[str, Any]

    def row(self, index: int) -> str:
        return f"{self.file}, row {self.start + index + 1}"


class Table(Protocol):
    """Rows in batches."""

    @property
    def names(self) -> list[str]:
        """Its columns."""

    @property
    def texts(self) -> frozenset[str]:
        """Those which are text."""

    @property
    def images(self) -> frozenset[str]:
        """Those which are images as Hugging Face keeps them: structs of ``bytes`` and ``path``."""

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """Names that the table itself knows for the ids in a column."""

    def batches(self, names: list[str]) -> Iterator[Batch]:
        """These columns of all rows."""


class CsvTable:
    """Every file is read twice: first to see which columns are whole numbers, numbers or text throughout."""

    labels: Mapping[str, tuple[str, ...]] = {}
    images: frozenset[str] = frozenset()

    def __init__(self, files: list[Path], header: bool) -> None:
        self._files = files
        self._header = header
        self.names = self._names(files[0])
        for path in files[1:]:
            if (other := self._names(path)) != self.names:
                raise _other_columns(path, other, files[0], self.names)
        self._kinds: dict[str, Any] | None = None

    def _names(self, path: Path) -> list[str]:
        try:
            with self._open(path) as reader:
                names = list(reader.schema.names)
        except (pa.ArrowInvalid, OSError) as exc:
            raise InputUnusable(f"{path} is no CSV file that can be read: {exc}") from exc
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputUnusable(f"{path}: two columns are called {twice!r}; each needs a name of its own")
        if self._header and all(_is_number(name) for name in names):
            raise InputUnusable(
                f"{path}: its first line holds numbers ({listed(names)}), no names of columns; add such a "
                "line, or "
                "set csv_header to false"
            )
        return names

    def _open(self, path: Path, convert: Any = None) -> Any:
        return pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=CSV_BLOCK_BYTES, autogenerate_column_names=not self._header
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter="\t" if path.suffix.lower() == ".tsv" else ",", newlines_in_values=True
            ),
            convert_options=convert,
        )

    @property
    def texts(self) -> frozenset[str]:
        return frozenset(name for name, kind in self._found().items() if kind == pa.string())

    def batches(self, names: list[str]) -> Iterator[Batch]:
        kinds = self._found()
        for batch in self._read(names):
            columns = {}
            for name, column in batch.columns.items():
                try:
                    columns[name] = pc.cast(column, kinds[name])
                except pa.ArrowInvalid as exc:
                    raise InputUnusable(f"{batch.file} changed while it was read: {exc}") from exc
            yield Batch(batch.file, batch.start, columns)

    def _read(self, names: list[str]) -> Iterator[Batch]:
        """All columns as text, without spaces around."""
        convert = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), include_columns=names, strings_can_be_null=False
        )
        for path in self._files:
            start = 0
            try:
                with self._open(path, convert) as reader:
                    for part in reader:
                        if part.num_rows:
                            columns = {
                                name: pc.utf8_trim_whitespace(column)
                                for name, column in zip(names, part.columns, strict=True)
                            }
                            yield Batch(str(path), start, columns)
                        start += part.num_rows
            except (pa.ArrowInvalid, OSError) as exc:
                raise InputUnusable(f"{path}, after row {start}: {exc}") from exc

    def _found(self) -> dict[str, Any]:
        if self._kinds is None:
            kinds = [_CsvKind(name) for name in self.names]
            for batch in self._read(self.names):
                for kind in kinds:
                    kind.see(batch)
            self._kinds = {kind.name: kind.result() for kind in kinds}
        return self._kinds


_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


class _CsvKind:
    """What a column of text in a CSV file is: the narrowest of I64, F64 and text that fits all rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._order = [pa.int64(), pa.float64(), pa.string()]
        self._numbers = 0
        self._rows = 0
        self._odd = ""
        self._missing = ""

    def see(self, batch: Batch) -> None:
        column = batch.columns[self.name]
        self._rows += len(column)
        if not self._missing and (empty := pc.index(column, "").as_py()) >= 0:
            self._missing = batch.row(empty)
        present = column.filter(pc.not_equal(column, ""))
        while True:
            try:
                pc.cast(present, self._order[0])
                break
            except pa.ArrowInvalid:
                del self._order[0]
        if self._order[0] == pa.string():
            numeric = pc.match_substring_regex(column, _NUMBER)
            self._numbers += pc.sum(numeric).as_py()
            if not self._odd and (at := pc.index(numeric, False).as_py()) >= 0:
                self._odd = f"{batch.row(at)} holds {column[at].as_py()!r}"
        else:
            self._numbers += len(column)

    def result(self) -> Any:
        if self._order[0] == pa.string() and self._numbers > self._rows / 2:
            raise InputUnusable(
                f"column {self.name!r} holds numbers, but {self._odd}; correct that value, or leave the "
                "column out"
            )
        if self._missing:
            raise InputUnusable(
                f"{self._missing}: column {self.name!r} has no value; fill it in, or leave the row or "
                "column out"
            )
        return self._order[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _other_columns(path: Path, names: list[str], first: Path, expected: list[str]) -> InputUnusable:
    return InputUnusable(
        f"{path} has other columns ({listed(names)}) than {first} ({listed(expected)}); all files of a "
        "dataset must "
        "have the same"
    )


class ParquetTable:
    """Parquet files with one schema."""

    labels: Mapping[str, tuple[str, ...]] = {}
    images: frozenset[str] = frozenset()

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        schema: Any = None
        for path in files:
            try:
                found = pyarrow.parquet.read_schema(path)
            except (pa.ArrowInvalid, OSError) as exc:
                raise InputUnusable(f"{path} is no Parquet file that can be read: {exc}") from exc
            schema = schema or found
            if not found.equals(schema):
                raise _other_columns(path, _typed(found), files[0], _typed(schema))
        self.names: list[str] = list(schema.names)
        self.texts = frozenset(field.name for field in schema if is_text(field.type))

    def batches(self, names: list[str]) -> Iterator[Batch]:
        for path in self._files:
            start = 0
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    row_bytes = _parquet_row_bytes(file.metadata)
                    rows = min(MAX_ROWS, rows_a_block(row_bytes))
                    for part in file.iter_batches(batch_size=rows, columns=names, use_threads=False):
                        yield Batch(str(path), start, {name: part.column(name) for name in names})
                        start += part.num_rows
            except (pa.ArrowInvalid, OSError) as exc:
                raise InputUnusable(f"{path}, after row {start}: {exc}") from exc


def _typed(schema: Any) -> list[str]:
    return [f"{field.name} {field.type}" for field in schema]


def _parquet_row_bytes(metadata: Any) -> int:
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return int(size // max(1, metadata.num_rows))


class SavedTable:
    """A dataset of the Hugging Face library."""

    def __init__(self, path: Path, dataset: Any) -> None:
        import datasets

        self._path = path
        self._dataset = dataset.with_format("arrow")
        self.names: list[str] = list(dataset.column_names)
        features = dataset.features
        self.labels: Mapping[str, tuple[str, ...]] = {
            name: tuple(one.names) for name, one in features.items() if isinstance(one, datasets.ClassLabel)
        }
        self.images = frozenset(name for name, one in features.items() if isinstance(one, datasets.Image))
        self.texts = frozenset(
            name
            for name, one in features.items()
            if isinstance(one, datasets.Value) and one.dtype in ("string", "large_string")
        )

    def batches(self, names: list[str]) -> Iterator[Batch]:
        chosen = self._dataset.select_columns(names)
        step = min(MAX_ROWS, rows_a_block(int(self._dataset.data.nbytes) // max(1, len(self._dataset))))
        start = 0
        try:
            for part in chosen.iter(batch_size=step):
                yield Batch(str(self._path), start, {name: part.column(name) for name in names})
                start += part.num_rows
        except (pa.ArrowInvalid, OSError) as exc:
            raise InputUnusable(f"{self._path}, after row {start}: {exc}") from exc


def saved_dataset(options: PrepareOptions) -> SavedTable:
    """The dataset at the only source, saved with ``save_to_disk``; of a DatasetDict, the split asked for."""
    import datasets

    if len(options.sources) != 1:
        raise InputUnusable("a Hugging Face dataset is one directory; prepare several one by one")
    path = options.sources[0]
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as exc:
        raise InputUnusable(f"{path} is no dataset saved with save_to_disk: {exc}") from exc
    if isinstance(loaded, datasets.DatasetDict):
        splits = listed(loaded)
        split = options.split or (next(iter(loaded)) if len(loaded) == 1 else None)
        if split is None or split not in loaded:
            raise ConfigError(
                [Problem(key="split", message=f"{path} has the splits {splits}; name one of them")]
            )
        loaded = loaded[split]
    elif options.split is not None:
        raise ConfigError([Problem(key="split", message=f"{path} has no splits; leave split out")])
    return SavedTable(path, loaded)


class TableSource:
    """A table's numbers, with text as ids and images decoded."""

    def __init__(self, table: Table, options: PrepareOptions) -> None:
        self.notes: list[str] = []
        self._table = table
        self._names = needed(table.names, options)
        self._options = options
        self.labels = {name: names for name, names in table.labels.items() if name in self._names}
        self._texts = [name for name in self._names if name in table.texts]
        # ids may have any type for whole numbers, but text is not to become an amount by a slip
        numeric = {name for name, dtype in options.dtypes.items() if dtype[0] not in "IU"}
        numeric |= set(options.scales) | set(options.shapes)
        members = {name for group in grouped(table.names, options).values() for name in group}
        for name in self._texts:
            if name in members or options.rename.get(name, name) in numeric:
                raise InputUnusable(f"column {name!r} is text, and cannot be used as numbers; leave it out")
        if self._texts:
            self._collect()

    def _collect(self) -> None:
        seen: dict[str, set[str]] = {name: set() for name in self._texts}
        for batch in self._table.batches(self._texts):
            for name, values in seen.items():
                column = plain(batch.columns[name])
                refuse_missing(column, name, batch.row)
                values.update(pc.unique(column).to_pylist())
                if len(values) > MAX_LABELS:
                    raise InputUnusable(
                        f"column {name!r} holds text with more than {MAX_LABELS} different values, too "
                        "many for labels; "
                        "leave it out by naming the columns to keep, or give a tokenizer to train on text"
                    )
        for name, values in seen.items():
            self.labels[name] = tuple(sorted(values))
            self.notes.append(f"column {name!r} is text; its {len(values)} different values became ids")

    def blocks(self) -> Iterator[Block]:
        ids = {name: pa.array(self.labels[name], pa.string()) for name in self._texts}
        decoders = {}
        if images := [name for name in self._names if name in self._table.images]:
            from hypha.data.sources.images import Decoder

            decoders = {name: Decoder(self._options, name) for name in images}
        for batch in self._table.batches(self._names):
            columns: dict[str, Array] = {}
            for name, column in batch.columns.items():
                if name in ids:
                    found = pc.index_in(plain(column).cast(pa.string()), ids[name])
                    columns[name] = found.to_numpy(zero_copy_only=False).astype(np.int64)
                elif name in decoders:
                    columns[name] = _decoded(plain(column), name, batch.row, decoders[name].decode)
                else:
                    columns[name] = to_array(column, name, batch.row)
            yield Block(batch.file, batch.start, columns)


def _decoded(column: Any, name: str, row: RowName, decode: Any) -> Array:
    refuse_missing(column, name, row)
    pixels = []
    for index, one in enumerate(column.to_pylist()):
        content = one["bytes"] if one["bytes"] is not None else Path(one["path"])
        pixels.append(decode(content, f"{row(index)}, column {name!r}"))
    return np.stack(pixels)

"""Parquet files, and datasets saved by the `datasets` library, as tables.

What that library notes beside the columns is used: which are images, and the names of classes. Parquet
files without such notes have images, too, where a column is a struct of ``bytes`` and ``path``, or bytes
that begin as image files do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from hypha.data.columns import listed, rows_a_block, rows_from
from hypha.data.options import PrepareOptions
from hypha.data.sources.splits import choose
from hypha.data.sources.tables.arrow_columns import is_list, is_text, plain, storage_of
from hypha.data.sources.tables.tables import Batch, Table, other_columns
from hypha.errors import InputUnusable

#: Rows read at a time, before their size is known to ask for fewer.
MAX_ROWS = 8192
_FEATURES = b"huggingface"
#: the numbers of rows, as pandas writes them beside the columns
_INDEX = re.compile(r"__index_level_\d+__$")
#: PNG, JPEG, GIF, BMP, TIFF in both orders of bytes, and RIFF, which WebP begins with.
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


class ParquetTable(Table):
    """Parquet files with the same columns. Their order may differ, and how wide their numbers are. ``keep``
    are columns that somebody asked for by name.
    """

    def __init__(self, files: list[Path], keep: Collection[str] = ()) -> None:
        self._files = files
        schema: Any = None
        for path in files:
            try:
                found = pyarrow.parquet.read_schema(path)
            except (pa.ArrowException, OSError) as exc:
                raise InputUnusable(f"{path} is no Parquet file that can be read: {exc}") from exc
            schema = schema or found
            if _compared(found) != _compared(schema):
                raise other_columns(path, _typed(found), files[0], _typed(schema))
        index = [name for name in schema.names if _INDEX.match(name) and name not in keep]
        types = {field.name: storage_of(field.type) for field in schema if field.name not in index}
        super().__init__(types, types)
        if index:
            self._notes.append(
                f"{listed(index)} is the index of a pandas data frame and is left out; --column {index[0]} "
                "takes it"
            )
        features = _features(schema)
        self.labels = _class_names(features)
        images = _of_class(features, "Image")
        self.images = frozenset(
            name
            for name, kind in self.types.items()
            if name in images or self._holds_images(name, kind, name in features)
        )

    def _holds_images(self, name: str, kind: Any, noted: bool) -> bool:
        if _is_pair(kind):
            return not noted
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            return False
        for batch in self.batches([name]):
            present = batch.columns[name].drop_null()
            if len(present):
                return bool(present[0].as_py().startswith(_MAGIC))
        return False

    def batches(self, names: list[str]) -> Iterator[Batch]:
        for path in self._files:
            yield from _batches(path, names, self._parts(path, names))

    def _parts(self, path: Path, names: list[str]) -> Iterator[Any]:
        with pyarrow.parquet.ParquetFile(path) as file:
            about = file.metadata
            size = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
            rows = min(MAX_ROWS, rows_a_block(size // max(1, about.num_rows)))
            yield from file.iter_batches(batch_size=rows, columns=names, use_threads=False)


def _batches(path: Path, names: list[str], parts: Iterator[Any]) -> Iterator[Batch]:
    start = 0
    try:
        for part in parts:
            columns = {name: plain(part.column(name)) for name in names}
            yield Batch(str(path), columns, rows_from(str(path), start))
            start += part.num_rows
    except (pa.ArrowException, OSError) as exc:
        raise InputUnusable(f"{path}, after row {start}: {exc}; is it whole?") from exc


def _is_pair(kind: Any) -> bool:
    """Whether a type is that in which `datasets` keeps files."""
    return bool(pa.types.is_struct(kind)) and {field.name for field in kind} == {"bytes", "path"}


def _features(schema: Any) -> Mapping[str, Any]:
    if _FEATURES not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        found: Mapping[str, Any] = datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError, pa.ArrowException):
        # written by another version, or by hand: the columns speak for themselves
        return {}
    return found


def _of_class(features: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if not features:
        return {}
    import datasets

    return {name: one for name, one in features.items() if isinstance(one, getattr(datasets, kind))}


def _class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(one.names) for name, one in _of_class(features, "ClassLabel").items() if one.names}


def _compared(schema: Any) -> dict[str, str]:
    return {field.name: _general(field.type) for field in schema}


def _general(kind: Any) -> str:
    """A type without what makes no difference to what becomes of it."""
    kind = storage_of(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_text(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "number"
    if is_list(kind):
        return f"list of {_general(kind.value_type)}"
    return str(kind)


def _typed(schema: Any) -> list[str]:
    return [f"{field.name} {field.type}" for field in schema]


class SavedTable(Table):
    def __init__(self, path: Path, dataset: Any, notes: list[str]) -> None:
        schema = dataset.features.arrow_schema
        super().__init__(
            dataset.column_names, {field.name: storage_of(field.type) for field in schema}, notes
        )
        self._path = path
        self._dataset = dataset.with_format("arrow")
        self.labels = _class_names(dataset.features)
        self.images = frozenset(_of_class(dataset.features, "Image"))

    def batches(self, names: list[str]) -> Iterator[Batch]:
        chosen = self._dataset.select_columns(names)
        step = min(MAX_ROWS, rows_a_block(int(self._dataset.data.nbytes) // max(1, len(self._dataset))))
        yield from _batches(self._path, names, chosen.iter(batch_size=step))


def saved_dataset(options: PrepareOptions) -> SavedTable:
    """The dataset at the only source, saved with ``save_to_disk``; of several splits, those asked for."""
    import datasets

    if len(options.sources) != 1:
        raise InputUnusable(
            f"{listed(map(str, options.sources))}: a dataset that save_to_disk made is one directory; "
            "prepare several one by one"
        )
    path = options.sources[0]
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as exc:
        raise InputUnusable(f"{path} is no dataset saved with save_to_disk: {exc}") from exc
    if not isinstance(loaded, datasets.DatasetDict):
        if options.split is not None:
            choose((), options.split, path)
        return SavedTable(path, loaded, [])
    splits, note = choose(tuple(loaded), options.split, path)
    parts = [loaded[split] for split in splits]
    joined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    return SavedTable(path, joined, [note] if note else [])

"""Where samples come from: any source is a stream of blocks, read once from start to end.

Libraries that only preparing needs are imported when a source needs them, so that a data node does
without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from hypha.data.columns import Block
from hypha.data.options import PrepareOptions, SourceKind
from hypha.errors import ConfigError, InputUnusable, Problem

TEXT_SUFFIXES = frozenset({".txt", ".md", ".text"})
CSV_SUFFIXES = frozenset({".csv", ".tsv"})
NUMPY_SUFFIXES = frozenset({".npy", ".npz"})
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)


class Source(Protocol):
    """Samples."""

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """Names behind ids, by source column; the id is the position. Complete before the first block."""

    @property
    def notes(self) -> list[str]:
        """What the user should know; complete after the last block."""

    def blocks(self) -> Iterator[Block]:
        """All samples, in a fixed order. Raises InputUnusable naming file, row or column."""


def open_source(options: PrepareOptions) -> Source:
    """The source that ``options`` name. Raises ConfigError when it cannot be told what it is, or a library
    is missing; InputUnusable when it is not what it should be.
    """
    kind = options.kind or detect_kind(options)
    try:
        return _open(kind, options)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"preparing from {kind} needs the Python package {exc.name!r}: pip install 'hypha-train[train]'"
        ) from exc


def _open(kind: SourceKind, options: PrepareOptions) -> Source:
    if kind == "numpy":
        from hypha.data.sources.arrays import ArraySource

        return ArraySource(found_files(options, NUMPY_SUFFIXES))
    if kind == "images":
        from hypha.data.sources.images import ImageFolder

        return ImageFolder(options)
    if kind == "text":
        from hypha.data.sources.text import TextSource, file_documents

        return TextSource(file_documents(found_files(options, TEXT_SUFFIXES)), options)
    from hypha.data.sources.tables import CsvTable, ParquetTable, Table, TableSource, saved_dataset

    table: Table
    if kind == "csv":
        table = CsvTable(found_files(options, CSV_SUFFIXES), options.csv_header)
    elif kind == "parquet":
        table = ParquetTable(found_files(options, frozenset({".parquet"})))
    else:
        table = saved_dataset(options)
    if options.tokenizer is not None:
        from hypha.data.sources.text import TextSource, table_documents

        return TextSource(table_documents(table, options.text_column), options)
    return TableSource(table, options)


def detect_kind(options: PrepareOptions) -> SourceKind:
    """What the sources are, by their names. Raises ConfigError when that cannot be told."""
    kinds = {_kind_of(source) for source in options.sources}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind
    what = ", ".join(str(source) for source in options.sources)
    raise ConfigError(
        [
            Problem(
                key="kind",
                message=f"cannot tell what {what} is; give one of huggingface, images, csv, parquet, text, "
                "numpy",
            )
        ]
    )


def _kind_of(source: Path) -> SourceKind | None:
    suffixes = {source.suffix.lower()}
    if source.is_dir():
        names = {path.name for path in source.iterdir() if not path.name.startswith(".")}
        if names & {"dataset_dict.json", "dataset_info.json"}:
            return "huggingface"
        suffixes = {Path(name).suffix.lower() for name in names}
    candidates: list[tuple[SourceKind, frozenset[str]]] = [
        ("parquet", frozenset({".parquet"})),
        ("csv", CSV_SUFFIXES),
        ("numpy", NUMPY_SUFFIXES),
        ("text", TEXT_SUFFIXES),
    ]
    found: list[SourceKind] = [kind for kind, known in candidates if suffixes & known]
    if len(found) == 1:
        return found[0]
    if not found and source.is_dir() and _has_images(source):
        return "images"
    return None


def _has_images(directory: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in directory.rglob("*"))


def found_files(options: PrepareOptions, suffixes: frozenset[str]) -> list[Path]:
    """The files that the sources name: files themselves, and of directories those with the right suffix,
    sorted by name, hidden ones left out. Raises InputUnusable when there are none.
    """
    found = []
    for source in options.sources:
        if source.is_dir():
            found += sorted(
                path
                for path in source.iterdir()
                if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
            )
        else:
            found.append(source)
    if not found:
        where = ", ".join(str(source) for source in options.sources)
        raise InputUnusable(f"{where} holds no files ending with {' or '.join(sorted(suffixes))}")
    return found

"""Where samples come from: any source is a stream of blocks, read once from start to end.

Libraries that only preparing needs are imported when a source needs them, so that a data node does
without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from hypha.data.columns import Block
from hypha.data.options import PrepareOptions
from hypha.data.sources.layout import Layout
from hypha.errors import ConfigError


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


def open_source(layout: Layout, options: PrepareOptions) -> Source:
    """The source that ``layout`` describes. Raises ConfigError when a library is missing; InputUnusable
    when it is not what it should be.
    """
    try:
        return _open(layout, options)
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"preparing from {layout.kind} needs the Python package {exc.name!r}: pip install "
            "'hypha-train[train]'"
        ) from exc


def _open(layout: Layout, options: PrepareOptions) -> Source:
    if layout.kind == "numpy":
        from hypha.data.sources.arrays import ArraySource

        return ArraySource(layout.paths, options)
    if layout.kind == "images":
        from hypha.data.sources.image_folders import DescribedImages, ImageFolder
        from hypha.data.sources.tables.tables import TableSource

        return (
            TableSource(DescribedImages(layout, options), options)
            if layout.metadata
            else ImageFolder(layout, options)
        )
    if layout.kind == "text":
        from hypha.data.sources.text import FileDocuments, TextSource

        return TextSource(FileDocuments(layout.paths, options.encoding), options)
    from hypha.data.sources.tables.arrow_tables import ParquetTable, saved_dataset
    from hypha.data.sources.tables.csv_table import CsvTable
    from hypha.data.sources.tables.json_table import JsonTable
    from hypha.data.sources.tables.tables import Table, TableSource

    table: Table
    if layout.kind == "csv":
        table = CsvTable(layout.paths, options)
    elif layout.kind == "json":
        table = JsonTable(layout.paths, options)
    elif layout.kind == "parquet":
        table = ParquetTable(layout.paths, options.columns)
    else:
        table = saved_dataset(options)
    if options.tokenizer is not None:
        from hypha.data.sources.text import TableDocuments, TextSource

        return TextSource(TableDocuments(table, options), options)
    return TableSource(table, options)

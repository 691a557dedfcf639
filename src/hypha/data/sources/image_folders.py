"""Directories of images: a directory a class, or images with a table of what is known about them, or images
alone; each in splits, or not. As the ImageFolder of the `datasets` library reads them.

``labels`` are the positions of the sorted names of classes, of all splits, so that they mean the same in
each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from hypha.data.columns import Block, listed
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
from hypha.data.sources.image_decoding import Decoder
from hypha.data.sources.layout import FILE_NAME, Layout, no_data, without_wrappers
from hypha.data.sources.reading import data_suffix
from hypha.data.sources.splits import split_word
from hypha.data.sources.tables.arrow_tables import ParquetTable
from hypha.data.sources.tables.csv_table import CsvTable
from hypha.data.sources.tables.json_table import JsonTable
from hypha.data.sources.tables.tables import Batch, Table
from hypha.errors import InputUnusable

PIXELS = "pixel_values"
LABELS = "labels"


class ImageFolder:
    def __init__(self, layout: Layout, options: PrepareOptions) -> None:
        if sum(source.is_dir() for source in options.sources) > 1:
            raise InputUnusable(
                f"{listed(map(str, options.sources))}: images are prepared from one directory, as those in "
                "it are the classes; put them into one, or prepare them one by one"
            )
        self._files = layout.paths
        self._decoder = Decoder(options, PIXELS)
        self._own_notes: list[str] = []
        everything = [*layout.files, *layout.others]
        folders = without_wrappers([one.folders for one in everything])
        names = sorted({parts[0] for parts in folders if parts})
        if names and (loose := [one for one, parts in zip(everything, folders, strict=True) if not parts]):
            raise InputUnusable(
                f"{loose[0].path} is beside directories ({listed(names)}); which class is it of? Move it "
                f"into one, or write a metadata.csv with the columns {FILE_NAME} and label"
            )
        self.labels: Mapping[str, tuple[str, ...]] = {LABELS: tuple(names)} if names else {}
        self._inhabited = {parent for one in everything for parent in one.path.parents}
        self._refuse_empty(options, names)
        numbers = {name: number for number, name in enumerate(names)}
        self._numbers = [numbers[parts[0]] for parts in folders[: len(self._files)] if parts]
        found = {names[number] for number in self._numbers}
        if absent := [name for name in names if name not in found]:
            self._own_notes.append(
                f"classes without an image here, but in other splits: {listed(absent)}; they keep their ids"
            )
        for name in names:
            if split_word(name) is not None:
                self._own_notes.append(
                    f"the directory {name} is taken for a class, as those beside it are no splits"
                )

    def _refuse_empty(self, options: PrepareOptions, names: list[str]) -> None:
        """A class that has lost its images would shift the others' ids."""
        for source in options.sources:
            named = options.split is not None and split_word(options.split) is None
            if not source.is_dir() or not names or named:
                continue
            inside = [source, *(path for path in source.iterdir() if path.is_dir() and split_word(path.name))]
            for path in sorted(path for parent in inside for path in parent.iterdir() if path.is_dir()):
                known = path in self._inhabited or path.name in names or split_word(path.name) is not None
                if not known and no_data(path) is None:
                    raise InputUnusable(
                        f"{path} holds no images; remove it, it would be a class without samples"
                    )

    @property
    def notes(self) -> list[str]:
        return [*self._own_notes, *self._decoder.notes]

    def blocks(self) -> Iterator[Block]:
        start = 0
        while start < len(self._files):
            # the first one decides the size when that is not given
            part = self._files[start : start + self._decoder.rows_a_block]
            columns: dict[str, Array] = {
                PIXELS: self._decoder.decode_all([(path, str(path)) for path in part])
            }
            if self._numbers:
                columns[LABELS] = np.array(self._numbers[start : start + len(part)], dtype=np.int64)
            yield Block([str(path) for path in part].__getitem__, columns)
            start += len(part)


class DescribedImages(Table):
    """Images with a table beside them: one row an image, which the column ``file_name`` names by its path
    from the table. As a table, it has the other columns, and ``pixel_values``.
    """

    def __init__(self, layout: Layout, options: PrepareOptions) -> None:
        self._tables = list(layout.metadata)
        self._base = self._opened(options)
        if FILE_NAME not in self._base.names:
            raise InputUnusable(
                f"{self._tables[0]} has no column {FILE_NAME!r}, which says which image a row is about; it "
                f"has {listed(self._base.names)}: rename one"
            )
        if PIXELS in self._base.names:
            raise InputUnusable(
                f"{self._tables[0]} has a column {PIXELS!r}, as the images are called; rename it"
            )
        super().__init__(
            [PIXELS, *(name for name in self._base.names if name != FILE_NAME)],
            {name: kind for name, kind in self._base.types.items() if name != FILE_NAME},
        )
        self.labels = self._base.labels
        self.images = frozenset({PIXELS})
        self._wanted = {path.resolve() for path in layout.paths}
        self._elsewhere = {one.path.resolve() for one in layout.others}
        self._named: set[Path] = set()
        self._folders = sorted({one.folders[0] for one in layout.files if one.folders})

    def _opened(self, options: PrepareOptions) -> Table:
        kinds = {data_suffix(path) for path in self._tables}
        if len(kinds) > 1:
            raise InputUnusable(
                f"{listed(map(str, self._tables))}: tables of several kinds beside one set of images; keep "
                "one kind"
            )
        # rows are told apart by what names the images, so that must stay as it is written
        kind = kinds.pop()
        if kind == ".csv":
            return CsvTable(self._tables, options, texts_only=frozenset({FILE_NAME}))
        return ParquetTable(self._tables) if kind == ".parquet" else JsonTable(self._tables, options)

    @property
    def notes(self) -> list[str]:
        notes = list(self._base.notes)
        if unnamed := sorted(self._wanted - self._named):
            names = [path.name for path in unnamed]
            notes.append(
                f"{len(names)} images are left out, as no row of {self._tables[0].name} names them "
                f"({listed(names[:3])})"
            )
        if len(self._folders) > 1:
            notes.append(
                f"directories ({listed(self._folders)}) are not taken for classes, as {self._tables[0].name} "
                "is there"
            )
        return notes

    def batches(self, names: list[str]) -> Iterator[Batch]:
        """Rows whose images are in the split that is taken."""
        columns = [FILE_NAME, *(name for name in names if name != PIXELS)]
        for batch in self._base.batches(columns):
            directory = Path(batch.file).parent
            paths: list[str] = []
            kept = []
            for index, name in enumerate(batch.columns[FILE_NAME].to_pylist()):
                path = directory / str(name)
                resolved = path.resolve()
                known = resolved in self._wanted or resolved in self._elsewhere
                if name is None or not (known or path.is_file()):
                    raise InputUnusable(
                        f"{batch.row(index)}: there is no image {path}; correct {FILE_NAME}, or take the row "
                        "out"
                    )
                kept.append(resolved not in self._elsewhere)
                paths.append(str(path.absolute()))
                self._named.add(resolved)
            pixels = pa.array([{"bytes": None, "path": path} for path in paths])
            made = {name: pixels if name == PIXELS else batch.columns[name] for name in names}
            yield Batch(batch.file, made, batch.row).kept(np.array(kept, dtype=bool))

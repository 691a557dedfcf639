"""Directories of images: a directory a class, or images with a table of what is known about them, or images
alone; each in splits, or not. As the ImageFolder of the `datasets` library reads them. And images as arrays:
decoded, turned as their EXIF orientation says, and brought to one size and number of channels.

``labels`` are the positions of the sorted names of classes, of all splits, so that they mean the same in
each. The arrays are channels first, ``F32`` from 0 to 1, or ``U8`` from 0 to 255 when that dtype is asked
for.
"""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from hypha.data.columns import Block, listed, rows_a_block
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
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
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Decoding is outside Python's lock; more threads do not help a disk.
DECODERS = 4
MAX_IMAGES = 256
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
#: Pillow opens some files of 16 bits a pixel as if they had 32.
_WIDE_FORMATS = ("PNG", "PPM")


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


class DescribedImages:
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
        self.names = [PIXELS, *(name for name in self._base.names if name != FILE_NAME)]
        self.types: Mapping[str, Any] = {
            name: kind for name, kind in self._base.types.items() if name != FILE_NAME
        }
        self.labels = self._base.labels
        self.texts = self._base.texts - {FILE_NAME}
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


class Decoder:
    """Images as arrays of one shape, as ``options`` say, or else as the first one is."""

    def __init__(self, options: PrepareOptions, column: str) -> None:
        self._channels = options.image_channels
        self._size = options.image_size
        self._raw = options.dtypes.get(options.rename.get(column, column)) == "U8"
        self._first = ""
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()

    @property
    def rows_a_block(self) -> int:
        """How many images are decoded at a time: one, while their size is not known."""
        if self._size is None:
            return 1
        pixel_bytes = self._channels * (1 if self._raw else 4)
        return min(MAX_IMAGES, rows_a_block(self._size[0] * self._size[1] * pixel_bytes))

    def decode_all(self, contents: Sequence[tuple[bytes | Path, str]]) -> Array:
        """Images (each with where it is, for people), one after the other along the first axis."""
        if len(contents) == 1:
            return np.stack([self.decode(*contents[0])])
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
            return np.stack(list(pool.map(lambda one: self.decode(*one), contents)))

    def decode(self, content: bytes | Path, where: str) -> Array:
        """One image. Raises InputUnusable naming ``where``."""
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
                pixels, mode = self._opened(opened, where)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as exc:
            raise InputUnusable(
                f"{where} is no image that can be read: {exc}; mend it, or take it out"
            ) from exc
        except Image.DecompressionBombError as exc:
            raise InputUnusable(f"{where} is too large an image: {exc}; make it smaller first") from exc
        with self._lock:
            self._seen["all"] += 1
            self._seen["grey"] += mode in ("1", "L", "LA", *_WIDE, "I")
        return pixels

    def _opened(self, opened: Image.Image, where: str) -> tuple[Array, str]:
        mode = opened.mode
        wide = mode in _WIDE or (mode == "I" and opened.format in _WIDE_FORMATS)
        if not wide and mode.startswith(("I", "F")):
            raise InputUnusable(
                f"{where} has pixels of more than 16 bits ({mode}), of which the range is not known; convert "
                "it, or prepare it as NumPy files"
            )
        turned = opened.getexif().get(0x0112, 1) not in (0, 1)
        alpha = opened.has_transparency_data
        with self._lock:
            self._seen["turned"] += turned
            self._seen["alpha"] += alpha and self._channels != 4
            self._seen["wide"] += wide
            self._seen["frames"] += getattr(opened, "n_frames", 1) > 1
        if turned:
            # else the pixels are as the sensor was held, not as people see them
            opened = ImageOps.exif_transpose(opened)
        if wide:
            image: Image.Image = Image.fromarray(
                np.asarray(opened).astype(np.float32) / np.float32(65535), "F"
            )
        elif mode in ("P", "PA") and alpha:
            # straight to RGB, Pillow warns
            image = opened.convert("RGBA").convert(_MODES[self._channels])
        else:
            image = opened.convert(_MODES[self._channels])
        return self._sized(image, where), mode

    def _sized(self, image: Image.Image, where: str) -> Array:
        if self._size is None:
            self._size, self._first = (image.height, image.width), where
        if (image.height, image.width) != self._size:
            if self._first:
                raise InputUnusable(
                    f"{where} has {image.height} x {image.width} pixels, {self._first} has {self._size[0]} x "
                    f"{self._size[1]}; give --image-size HEIGHTxWIDTH, to which all are resized"
                )
            image = image.resize((self._size[1], self._size[0]), Image.Resampling.BILINEAR)
        if image.mode == "F":
            grey = np.asarray(image).clip(0, 1)
            planes = [grey] * min(3, self._channels) + [np.ones_like(grey)] * (self._channels == 4)
            pixels = np.stack(planes)
            return np.rint(pixels * 255).astype(np.uint8) if self._raw else pixels
        pixels = np.asarray(image).reshape(*self._size, self._channels).transpose(2, 0, 1)
        return pixels if self._raw else pixels.astype(np.float32) / np.float32(255)

    @property
    def notes(self) -> list[str]:
        """What was done to images that not everybody would do, with how many."""
        seen, notes = self._seen, []
        if seen["turned"]:
            notes.append(f"{seen['turned']} images are turned as their EXIF orientation says")
        if seen["alpha"]:
            notes.append(f"transparency of {seen['alpha']} images is dropped; --image-channels 4 keeps it")
        if seen["wide"]:
            kept = "256 levels are kept; without --dtype U8 all are" if self._raw else "scaled to 0 to 1"
            notes.append(f"{seen['wide']} images have 16 bits a pixel; {kept}")
        if seen["frames"]:
            notes.append(f"{seen['frames']} images have several frames, of which the first is taken")
        if seen["all"] and seen["grey"] == seen["all"] and self._channels > 1:
            notes.append("all images are grey, in three equal channels; --image-channels 1 keeps one")
        return notes

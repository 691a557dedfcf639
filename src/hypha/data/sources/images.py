"""Images: a folder with a sub-directory a class, or a flat one; and the decoding of single images.

A sample's ``pixel_values`` are channels first, ``F32`` from 0 to 1, or ``U8`` from 0 to 255 when that
dtype is asked for; ``labels`` are the positions of the sorted class names.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hypha.data.columns import Block, rows_a_block
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
from hypha.data.sources.opening import IMAGE_SUFFIXES
from hypha.errors import InputUnusable

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Decoding is outside Python's lock; more threads do not help a disk.
DECODERS = 4


class Decoder:
    """Images as arrays of one shape, as ``options`` say, or else as the first one is."""

    def __init__(self, options: PrepareOptions, column: str) -> None:
        self._mode = _MODES[options.image_channels]
        self._size = options.image_size
        self._raw = options.dtypes.get(options.rename.get(column, column)) == "U8"
        self._first: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded image, 1 while that is not known."""
        if self._size is None:
            return 1
        return self._size[0] * self._size[1] * len(self._mode) * (1 if self._raw else 4)

    def decode(self, content: bytes | Path, where: str) -> Array:
        """One image. Raises InputUnusable naming ``where``."""
        try:
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise InputUnusable(
                        f"{where} has pixels of more than 8 bits ({opened.mode}); convert it, or "
                        "prepare it as NumPy files"
                    )
                image = opened.convert(self._mode)
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as exc:
            raise InputUnusable(
                f"{where} is no image that can be read: {exc}; mend it, or take it out"
            ) from exc
        if self._size is None:
            self._size, self._first = (image.height, image.width), where
        if (image.height, image.width) != self._size:
            if self._first:
                raise InputUnusable(
                    f"{where} has {image.height} x {image.width} pixels, {self._first} has "
                    f"{self._size[0]} x {self._size[1]}; give an image_size to which all are resized"
                )
            image = image.resize((self._size[1], self._size[0]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image).reshape(*self._size, len(self._mode)).transpose(2, 0, 1)
        return pixels if self._raw else pixels.astype(np.float32) / np.float32(255)


class ImageFolder:
    """See the module. Hidden files and files that are no images by name are left out (and counted)."""

    def __init__(self, options: PrepareOptions) -> None:
        if len(options.sources) != 1:
            raise InputUnusable(
                "images are prepared from one directory; put the classes' directories into one"
            )
        root = options.sources[0] / options.split if options.split else options.sources[0]
        if not root.is_dir():
            raise InputUnusable(f"{root} is no directory of images")
        self.notes: list[str] = []
        self._root = root
        self._decoder = Decoder(options, "pixel_values")
        self._ignored = 0
        classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        flat = self._images(root, deep=False)
        if classes and flat:
            raise InputUnusable(
                f"{root} holds both images ({flat[0].name}) and directories ({classes[0].name}); which "
                "class are the images of? Move them"
            )
        self._files: list[tuple[Path, int]] = [(path, 0) for path in flat]
        for number, directory in enumerate(classes):
            images = self._images(directory, deep=True)
            if not images:
                raise InputUnusable(
                    f"{directory} holds no images; remove it, it would be a class without samples"
                )
            self._files += [(path, number) for path in images]
        if not self._files:
            raise InputUnusable(f"{root} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
        self._classes = bool(classes)
        self.labels: Mapping[str, tuple[str, ...]] = (
            {"labels": tuple(path.name for path in classes)} if classes else {}
        )
        if self._ignored:
            self.notes.append(f"{self._ignored} files that are no images by name were left out")

    def _images(self, directory: Path, deep: bool) -> list[Path]:
        found = []
        for path in sorted(directory.rglob("*") if deep else directory.iterdir()):
            if not path.is_file() or path.name.startswith("."):
                continue
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found.append(path)
            else:
                self._ignored += 1
        return found

    def blocks(self) -> Iterator[Block]:
        # alone, so that it decides the size when that is not given
        first = self._decoder.decode(self._files[0][0], str(self._files[0][0]))
        step = min(256, rows_a_block(first.nbytes))
        with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
            for start in range(0, len(self._files), step):
                part = self._files[start : start + step]
                pixels = pool.map(lambda one: self._decoder.decode(one[0], str(one[0])), part)
                columns: dict[str, Array] = {"pixel_values": np.stack(list(pixels))}
                if self._classes:
                    columns["labels"] = np.array([label for _, label in part], dtype=np.int64)
                yield Block(str(self._root), start, columns)

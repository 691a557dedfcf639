"""Images as arrays: decoded, turned as their EXIF orientation says, and brought to one size and number of
channels.

The arrays are channels first, ``F32`` from 0 to 1, or ``U8`` from 0 to 255 when that dtype is asked for.
"""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hypha.data.columns import rows_a_block
from hypha.data.options import PrepareOptions
from hypha.data.slices import Array
from hypha.errors import InputUnusable

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
#: Decoding is outside Python's lock; more threads do not help a disk.
DECODERS = 4
MAX_IMAGES = 256
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
#: Pillow opens some files of 16 bits a pixel as if they had 32.
_WIDE_FORMATS = ("PNG", "PPM")


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

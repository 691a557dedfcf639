"""Opening files that people bring: compressed or not, with a byte order mark or not, in whatever encoding."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from hypha.errors import ConfigError, InputUnusable, Problem

#: by the last suffix
_OPENERS: dict[str, Callable[[Path], object]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": zstandard.open,
}
#: What reading a file that is cut, or is not compressed as its name says, raises.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
#: the longest first: UTF-32's begins like UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_BYTES = 1 << 20


def data_suffix(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: ``.csv`` of ``Table.CSV.gz``."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in _OPENERS else suffix


def open_data(path: Path) -> IO[bytes]:
    """The file's content, decompressed. Raises one of :data:`BROKEN`, as reading from it does."""
    opener = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if opener is None else cast(IO[bytes], opener(path))


def head_of(path: Path) -> tuple[bytes, bool]:
    """The beginning of a file, and whether that is all of it. Raises InputUnusable."""
    try:
        with open_data(path) as file:
            # one read of a compressed file may give less
            head = b""
            while len(head) <= _HEAD_BYTES and (more := file.read(_HEAD_BYTES + 1 - len(head))):
                head += more
    except BROKEN as exc:
        raise InputUnusable(f"{path} cannot be read: {exc}; is it whole?") from exc
    return head[:_HEAD_BYTES], len(head) <= _HEAD_BYTES


def encoding_of(head: bytes, asked: str | None) -> str:
    """The encoding of a text file: what was asked for, what its byte order mark says, or UTF-8.

    Raises ConfigError for an encoding that nobody knows.
    """
    if asked is not None:
        try:
            return codecs.lookup(asked).name
        except LookupError as exc:
            message = f"there is no encoding {asked!r}; take one such as utf-8, utf-16, latin-1, cp1252"
            raise ConfigError([Problem("encoding", message, "--encoding")]) from exc
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


@contextlib.contextmanager
def open_text(path: Path, asked: str | None) -> Iterator[io.TextIOWrapper]:
    """The file as text, line ends kept as they are. Raises InputUnusable, also for what cannot be read later,
    and ConfigError.
    """
    encoding = encoding_of(head_of(path)[0], asked)
    try:
        binary = cast(io.BufferedReader, open_data(path))
        with io.TextIOWrapper(binary, encoding=encoding, newline="") as file:
            yield file
    except UnicodeDecodeError as exc:
        raise not_in_encoding(path, asked) from exc
    except BROKEN as exc:
        raise InputUnusable(f"{path} cannot be read: {exc}; is it whole?") from exc


def not_in_encoding(path: Path, asked: str | None) -> InputUnusable:
    """The error for a file that is not text in its encoding; it names the line and what to do."""
    head, _ = head_of(path)
    encoding = encoding_of(head, asked)
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    where = ""
    try:
        with open_data(path) as file:
            for number, raw in enumerate(file, 1):
                line = number
                decoder.decode(raw)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as exc:
        where = f"; byte {exc.start + 1} of line {line} is 0x{exc.object[exc.start]:02x}"
    except BROKEN as exc:
        return InputUnusable(f"{path}, near line {line}: {exc}; is the file whole?")
    if head.count(0) > len(head) // 4:
        where = "; it has zero bytes"
        advice = "it looks like UTF-16 without a byte order mark: --encoding utf-16-le"
    elif not where and 0 in head:
        where, advice = "; it has zero bytes", "it may be damaged, or no text at all"
    else:
        advice = "give the encoding it has, such as --encoding cp1252 (Windows) or latin-1"
    return InputUnusable(f"{path} is not {encoding.upper().replace('-SIG', '')} text{where}; {advice}")

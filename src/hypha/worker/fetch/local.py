"""Local paths and fsspec URLs: fetched from, and stored to, whole or not at all.

A directory appears at a path by one rename. Where there is no rename the file that makes it complete, its
marker, goes first when something is replaced or deleted and comes last when it is written. What is older can
be pruned. Size limits hold while reading. What third parties raise comes out as :class:`TransferFailed`.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import fsspec
import trio

from hypha.errors import HyphaError, Refused, TransferFailed
from hypha.files import beneath
from hypha.files.places import UrlPlace
from hypha.files.staging import StagedDirectory, StagedFile, remove_unfinished
from hypha.runtime import check_cancelled, in_thread
from hypha.worker.fetch.allowance import Allowance

logger = logging.getLogger("hypha.worker.send")

CHUNK_BYTES = 1 << 20
#: A back end that is silent holds one of these, and none of those that all of the worker needs.
_THREADS = trio.CapacityLimiter(16)


def safe_name(name: str, fallback: str) -> str:
    """The last segment of ``name`` as a file name."""
    last = posixpath.basename(unquote(name).replace("\\", "/").rstrip("/"))
    return last if last not in ("", ".", "..") and "\0" not in last and len(last) < 200 else fallback


@contextmanager
def translated(place: Path | str) -> Iterator[None]:
    """Any error of a place as :class:`TransferFailed`: each back end of fsspec raises its own."""
    try:
        yield
    except HyphaError:
        raise
    except Exception as exc:
        raise TransferFailed("this node", str(place), f"{type(exc).__name__}: {exc}") from exc


def chunks_of(source: BinaryIO) -> Iterator[bytes]:
    """What is in ``source``; trio.Cancelled, in a thread whose caller was cancelled."""
    while data := source.read(CHUNK_BYTES):
        check_cancelled()
        yield data


async def fetch_local(url: str, directory: Path, allowance: Allowance) -> list[Path]:
    """Copy a file, or all files below a directory, from a local path or any fsspec URL."""
    place = allowance.read_local(url)
    # Back ends may be silent for minutes; after a cancellation the thread ends by itself.
    silent = not isinstance(place, Path)
    return await in_thread(_copy, place, directory, allowance, abandon_on_cancel=silent, limiter=_THREADS)


def _copy(place: Path | str, directory: Path, allowance: Allowance) -> list[Path]:
    with translated(place):
        sources = _sources_at(place) if isinstance(place, str) else _sources_below(place, allowance)
        limit = allowance.max_file_bytes
        return [_copy_in(opener, directory, name, limit) for name, opener in sources.items()]


def _sources_below(place: Path, allowance: Allowance) -> dict[str, Callable[[], BinaryIO]]:
    if place.is_file():
        return {place.name: partial(_open, place)}
    if not place.is_dir():
        raise Refused("not-found", f"no file or directory {place}")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    # a link inside an allowed directory may point out of it
    return {
        path.relative_to(place).as_posix(): partial(_open, Path(allowance.read_local(str(path))))
        for path in files
    }


def _sources_at(url: str) -> dict[str, Callable[[], BinaryIO]]:
    filesystem, root = fsspec.url_to_fs(url)
    filesystem.invalidate_cache()
    if filesystem.isfile(root):
        return {safe_name(root, "file"): partial(filesystem.open, root, "rb")}
    paths = filesystem.find(root)
    if not paths:
        raise Refused("not-found", f"nothing at {url}")
    top = root.rstrip("/")
    return {posixpath.relpath(path, top): partial(filesystem.open, path, "rb") for path in paths}


def _open(path: Path) -> BinaryIO:
    """``path`` was resolved and allowed: whoever puts a link there now does not lead elsewhere."""
    with beneath.directory_below(Path("/"), path.parent.parts[1:]) as directory:
        return open(beneath.open_file(directory, path.name), "rb")


def _copy_in(opener: Callable[[], BinaryIO], directory: Path, name: str, max_bytes: int) -> Path:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        raise Refused("invalid", f"file name {name!r} leaves the directory")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    size = 0
    with opener() as source, StagedFile(path, durable=True, mode=0o600) as staged:
        for data in chunks_of(source):
            size += len(data)
            if size > max_bytes:
                raise Refused("too-large", f"{name} has more than the allowed {max_bytes} bytes")
            staged.file.write(data)
        staged.publish()
    return path


async def store_local(
    path: Path, url: str, allowance: Allowance, marker: str = "", newest: int | None = None
) -> None:
    """Write the file or directory ``path`` to ``url``, replacing what is there. ``marker`` is the file with
    which a directory is complete. With ``newest``, the directory's siblings are pruned: of those with a
    number for a name, up to its own, so many complete ones stay.
    """
    place = allowance.write_local(url)
    if "/" in marker or marker in (".", ".."):
        raise Refused("invalid", f"{marker!r} is no file name")
    if newest is not None and (newest < 1 or _number(posixpath.basename(url)) is None):
        raise Refused("invalid", "what is pruned has a number for a name, and at least one stays")

    def may_remove(sibling: str) -> bool:
        try:
            allowance.write_local(sibling)
        except Refused:
            return False
        return True

    # Back ends may be silent for minutes; after a cancellation the thread ends by itself.
    await in_thread(_store, path, place, marker, newest, may_remove, abandon_on_cancel=True, limiter=_THREADS)


def _store(
    path: Path, place: Path | str, marker: str, newest: int | None, may_remove: Callable[[str], bool]
) -> None:
    if path.is_dir() and not (path / marker).is_file():
        raise Refused("invalid", f"{path.name} is a directory, but has no file {marker!r}")
    with translated(place):
        store = _PathStore(place, marker) if isinstance(place, Path) else _UrlStore(place, marker)
        store.store(path)
    if newest is not None and path.is_dir():
        try:
            with translated(place):
                store.prune_siblings(newest, may_remove)
        except TransferFailed as exc:
            # what was to be stored is; the next one prunes again
            logger.warning("Older ones than %s could not be deleted: %s", place, exc.reason)


class _PathStore:
    """The path ``place``."""

    def __init__(self, place: Path, marker: str) -> None:
        self._place = place
        self._marker = marker

    def store(self, path: Path) -> None:
        place = self._place
        if not path.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, StagedFile(place, durable=True) as staged:
                for data in chunks_of(source):
                    staged.file.write(data)
                staged.publish()
            return
        with StagedDirectory(place, durable=True) as staged_directory:
            for name in _names(path):
                staged_directory.copy(path / name, name, check_cancelled)
            staged_directory.publish(before=check_cancelled)

    def prune_siblings(self, newest: int, may_remove: Callable[[str], bool]) -> None:
        parent = self._place.parent
        siblings = {one.name: (one / self._marker).is_file() for one in parent.iterdir() if one.is_dir()}
        for name in _outdated(siblings, self._place.name, newest):
            if may_remove(str(parent / name)):
                # cut short, it does not look complete
                (parent / name / self._marker).unlink(missing_ok=True)
                shutil.rmtree(parent / name)
        # what a worker left of one when it was killed
        remove_unfinished(parent, lambda name: _number(name) is not None and may_remove(str(parent / name)))


class _UrlStore:
    """The place ``url`` of a file system without renames."""

    def __init__(self, url: str, marker: str) -> None:
        parent, self._name = posixpath.split(url.rstrip("/"))
        self._parent = UrlPlace(parent)
        self._marker = marker

    def store(self, path: Path) -> None:
        if not path.is_dir():
            self._parent.put(path, self._name)
            return
        self._remove(self._name)
        for name in [*(name for name in _names(path) if name != self._marker), self._marker]:
            check_cancelled()
            self._parent.put(path / name, f"{self._name}/{name}")

    def prune_siblings(self, newest: int, may_remove: Callable[[str], bool]) -> None:
        siblings = {
            name: self._parent.exists(f"{name}/{self._marker}")
            for name in self._parent.list()
            if _number(name) is not None
        }
        for name in _outdated(siblings, self._name, newest):
            check_cancelled()
            if may_remove(f"{self._parent.url}/{name}"):
                self._remove(name)

    def _remove(self, name: str) -> None:
        self._parent.remove(f"{name}/{self._marker}")
        self._parent.remove_directory(name)


def _names(directory: Path) -> list[str]:
    """Files of the directory itself: an executor's link shall not carry away what lies elsewhere."""
    return sorted(
        (Path(place) / name).relative_to(directory).as_posix()
        for place, _, names in os.walk(directory)
        for name in names
        if not (Path(place) / name).is_symlink()
    )


def _number(name: str) -> int | None:
    return int(name) if re.fullmatch(r"0|[1-9][0-9]*", name) else None


def _outdated(siblings: Mapping[str, bool], name: str, newest: int) -> list[str]:
    """Names of numbered directories to delete; the value says whether one is complete. Those above
    ``name`` are of an earlier generation, which went further, and will be replaced.
    """
    numbers = {one: number for one in siblings if (number := _number(one)) is not None}
    last = int(name)
    older = [one for one in sorted(numbers, key=numbers.__getitem__) if numbers[one] <= last]
    kept = [one for one in older if siblings[one]][-newest:]
    return [one for one in older if one not in kept]

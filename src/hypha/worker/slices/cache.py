"""Slices on disk, shared by all jobs of a worker, least recently used out first.

An entry is a file named by its BLAKE3 hash, verified when it was pulled. Here its size is checked when it is
used again; whoever uses it verifies its bytes (disks rot) and says :meth:`SliceCache.drop` when they are
others. Jobs get hard links, so evicting an entry never takes a file from under an executor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import msgspec
from msgspec import Struct

from hypha.config.models import CacheConfig
from hypha.decoding import decode_json
from hypha.errors import Undecodable
from hypha.files.staging import write_whole
from hypha.messages import SliceAssigned
from hypha.runtime import lack_of_space

logger = logging.getLogger("hypha.worker.cache")

GB = 10**9
_INDEX = "index.json"


class _Entry(Struct, frozen=True):
    blake3: str
    dataset: str
    index: int
    size: int


class SliceCache:
    """``directory`` belongs to this worker alone. Methods touch the disk only in small ways and are not
    thread-safe: call them from the event loop.
    """

    def __init__(self, directory: Path, config: CacheConfig) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._max_slices = config.max_slices
        #: all its entries together
        self.max_bytes = int(config.max_gb * GB)
        self._entries = self._load()
        self._evict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self._entries.values())

    def cached(self, dataset: str) -> tuple[int, ...]:
        """Indices of the slices of ``dataset`` that are here."""
        return tuple(sorted(entry.index for entry in self._entries.values() if entry.dataset == dataset))

    def datasets(self) -> frozenset[str]:
        return frozenset(entry.dataset for entry in self._entries.values())

    def incoming(self, assigned: SliceAssigned) -> Path:
        """Where to pull ``assigned`` to before :meth:`insert`; the same each time, so it can be resumed."""
        return self._directory / f"incoming-{_checked(assigned.blake3)}"

    def insert(self, assigned: SliceAssigned, path: Path) -> None:
        """Take over the verified file at ``path``."""
        path.chmod(0o400)
        path.replace(self._path(assigned.blake3))
        self._entries[assigned.blake3] = _Entry(
            blake3=assigned.blake3, dataset=assigned.dataset, index=assigned.index, size=assigned.size
        )
        self._entries.move_to_end(assigned.blake3)
        self._evict()
        self._save()

    def link(self, assigned: SliceAssigned, destination: Path) -> bool:
        """Put the slice, read-only, at ``destination``; False when it is not here."""
        path = self._path(_checked(assigned.blake3))
        try:
            sound = path.stat().st_size == assigned.size
        except FileNotFoundError:
            sound = False
        if not sound or assigned.blake3 not in self._entries:
            if self._entries.pop(assigned.blake3, None) is not None:
                logger.warning("Cached slice %s is damaged or gone; dropped.", assigned.blake3)
                self._save()
            path.unlink(missing_ok=True)
            return False
        # what is there is not ours: an executor may write where its slices are
        destination.unlink(missing_ok=True)
        try:
            os.link(path, destination)
        except OSError:  # a file system without hard links, or too many of them
            with path.open("rb") as source, destination.open("xb") as made:
                os.fchmod(made.fileno(), 0o400)
                shutil.copyfileobj(source, made)
        self._entries.move_to_end(assigned.blake3)
        self._save()
        return True

    def drop(self, assigned: SliceAssigned, link: Path) -> None:
        """Its bytes are not those that were pulled, so ``link`` goes as well."""
        link.unlink(missing_ok=True)
        logger.error("Cached slice %s is damaged; dropped. Look at the disk.", assigned.blake3)
        self._forget(assigned.blake3)
        self._save()

    def require_space(self, size: int) -> None:
        """Let go of slices until ``size`` bytes more fit on the disk. OSError when they do not even then."""
        while (lack := lack_of_space(self._directory, size)) is not None:
            if not self._entries:
                raise OSError(lack)
            self._forget(next(iter(self._entries)))
            self._save()

    def _forget(self, blake3: str) -> None:
        self._entries.pop(blake3, None)
        self._path(blake3).unlink(missing_ok=True)

    def _path(self, blake3: str) -> Path:
        return self._directory / f"{blake3}.safetensors"

    def _evict(self) -> None:
        # The newest entry stays even when it alone is over the bound: it is about to be used.
        while len(self._entries) > 1 and (
            len(self._entries) > self._max_slices or self.size_bytes > self.max_bytes
        ):
            self._forget(next(iter(self._entries)))

    def _load(self) -> OrderedDict[str, _Entry]:
        """The index's entries whose files are here with the right size; other files are removed."""
        entries: OrderedDict[str, _Entry] = OrderedDict()
        with contextlib.suppress(FileNotFoundError, Undecodable):
            known = decode_json((self._directory / _INDEX).read_bytes(), list[_Entry])
            for entry in known:
                with contextlib.suppress(OSError):
                    if self._path(entry.blake3).stat().st_size == entry.size:
                        entries[entry.blake3] = entry
        keep = {self._path(blake3).name for blake3 in entries}
        for path in self._directory.iterdir():
            # partly pulled slices stay: they are resumed when their slice is assigned again
            if path.suffix == ".safetensors" and path.name not in keep:
                path.unlink()
        for path in sorted(self._directory.glob("incoming-*"))[: -self._max_slices]:
            path.unlink()
        return entries

    def _save(self) -> None:
        try:
            write_whole(self._directory / _INDEX, msgspec.json.encode(list(self._entries.values())))
        except OSError as exc:
            # it only serves the next start of the worker
            logger.warning("The index of the slice cache cannot be written: %s", exc)


def _checked(blake3: str) -> str:
    """A hash becomes a file name, so it must be one."""
    if len(blake3) != 64 or not all(character in "0123456789abcdef" for character in blake3):
        raise ValueError(f"{blake3!r} is no BLAKE3 hash in hex")
    return blake3

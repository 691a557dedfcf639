"""Files at both ends of a transfer: read as they were promised, written so that half is never whole.

Everything here blocks and runs in threads. What arrives goes to ``<destination>.part`` and is hashed on
its way; only when all is there and the hash is right does it get its name. Kinds that must survive a
power cut are synced before that; the others are hashed again by whoever reads them, or sent again.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path
from typing import BinaryIO, Protocol

from blake3 import blake3
from xxhash import xxh3_128

from hypha.files import disks
from hypha.files.disks import explained, is_disk_full, sync
from hypha.messages import QUICK_KINDS, TransferMeta
from hypha.net.bulk.wire import BLOCK_BYTES

#: Acknowledged only when on disk. An update, theta or slice lost in a power cut is simply sent again.
DURABLE_KINDS = frozenset({"checkpoint", "export", "model"})

#: Files in a directory of this name, beside where one is to arrive, are written over.
SPARE = ".spare"


class FileChanged(Exception):
    """The file to send is not (any more) what was promised."""


class DiskFailed(Exception):
    """What arrives cannot be written; ``full`` when for lack of space."""

    def __init__(self, path: Path, exc: OSError) -> None:
        self.full = is_disk_full(exc)
        super().__init__(f"{path} cannot be written: {explained(exc)}")


class WrongHash(Exception):
    """All bytes are there and are not the promised ones; they were deleted."""


class StreamHash(Protocol):
    """As those of :mod:`hashlib`."""

    def update(self, data: bytes | memoryview, /) -> object:
        """More bytes."""

    def hexdigest(self) -> str:
        """Of all of them."""


def strong_hasher() -> StreamHash:
    """BLAKE3, in one thread: the training next to us needs the cores."""
    return blake3(max_threads=1)


def quick_hasher() -> StreamHash:
    return xxh3_128()


def hash_file(
    path: Path, stop: threading.Event | None = None, hasher: StreamHash | None = None
) -> tuple[int, str]:
    """Size and hash (hex; BLAKE3 unless by another ``hasher``) of a file."""
    hasher = hasher or strong_hasher()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    size = 0
    with path.open("rb", buffering=0) as file:
        while (count := file.readinto(buffer)) and not (stop is not None and stop.is_set()):
            hasher.update(buffer[:count])
            size += count
    return size, hasher.hexdigest()


class SourceFile:
    """A file being sent. Read into buffers rather than mapped: a mapped file that somebody truncates
    kills the process.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as exc:
            raise FileChanged(f"{path} cannot be read: {exc.strerror or exc}") from exc
        found = os.fstat(self._file.fileno()).st_size
        if found != size:
            self._file.close()
            raise FileChanged(f"{path} has {found} bytes, {size} were promised")

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def read_into(self, view: memoryview) -> int:
        """Fill ``view`` (never longer than what is left) as far as one read goes."""
        try:
            count = self._file.readinto(view)
        except OSError as exc:
            raise FileChanged(f"{self._path} cannot be read: {exc.strerror or exc}") from exc
        if not count:
            raise FileChanged(f"{self._path} became shorter while it was being sent")
        return count

    def close(self) -> None:
        self._file.close()


class PartFile:
    """A file being received: ``open``, then ``write`` until ``finish``, ``keep`` or ``discard``."""

    def __init__(self, destination: Path, meta: TransferMeta) -> None:
        self.destination = destination
        self.path = part_path(destination)
        self._meta = meta
        self._file: BinaryIO | None = None
        # which one is for the receiver to say: a sender could claim anything
        self._hasher = quick_hasher() if meta.kind in QUICK_KINDS else strong_hasher()
        self._lock = threading.Lock()
        self._opened = False
        self._abandoned = False
        #: it lies over an old file, what of that is longer has to go
        self._over = False
        self.received = 0

    def open(self, fresh: bool) -> int:
        """The offset to go on from; 0 with ``fresh``, which drops what an earlier attempt left. May take
        long, as what is there is hashed; ``abandon`` ends it from another thread.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._over = (fresh or not self.path.exists()) and _take_spare(self.path)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(self.path, flags, 0o600)
            # closed by finish, keep or discard
            self._file = file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
            if self._over:
                return 0
            if fresh or os.fstat(descriptor).st_size > self._meta.size:
                file.truncate(0)
            buffer = memoryview(bytearray(BLOCK_BYTES))
            while not self._abandoned and (count := file.readinto(buffer)):
                self._hasher.update(buffer[:count])
                self.received += count
        except OSError as exc:
            self.keep()
            raise DiskFailed(self.path, exc) from exc
        finally:
            with self._lock:
                self._opened = True
                if self._abandoned:
                    self.keep()
        return self.received

    def abandon(self) -> None:
        """Nobody waits for ``open`` any more: it is to end and to close the file."""
        with self._lock:
            self._abandoned = True
            if self._opened:
                self.keep()

    def write(self, view: memoryview | bytes) -> None:
        """Append; DiskFailed when that cannot be."""
        if self._file is None:
            raise ValueError("the part file is not open")
        try:
            rest = memoryview(view)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as exc:
            raise DiskFailed(self.path, exc) from exc
        self._hasher.update(view)
        self.received += len(view)

    def finish(self) -> None:
        """Verify, sync where the kind wants it, give it its name. WrongHash, DiskFailed."""
        if self._file is None:
            raise ValueError("the part file is not open")
        if self.received != self._meta.size or self._hasher.hexdigest() != self._meta.checked:
            self.discard()
            raise WrongHash(f"{self._meta.name}: the {self._meta.size} bytes do not have the promised hash")
        durable = self._meta.kind in DURABLE_KINDS
        try:
            if self._over:
                self._file.truncate(self.received)
            if durable:
                os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.path, self.destination)
            if durable:
                sync(self.destination.parent)
        except OSError as exc:
            self.discard()
            raise DiskFailed(self.destination, exc) from exc

    def keep(self) -> None:
        """Close it; what is there serves a later resume."""
        if self._file is not None and not self._file.closed:
            if self._over:
                with contextlib.suppress(OSError):
                    self._file.truncate(self.received)
            with contextlib.suppress(OSError):  # what was written last may not be there
                self._file.close()

    def discard(self) -> None:
        """Close and delete it; where its disk does not allow that, it is a part that will be begun anew."""
        self.keep()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def copy_verified(source: Path, destination: Path, meta: TransferMeta) -> None:
    """What a transfer does, within one machine. FileChanged, WrongHash, DiskFailed."""
    file = SourceFile(source, meta.size)
    part = PartFile(destination, meta)
    buffer = memoryview(bytearray(BLOCK_BYTES))
    try:
        part.open(fresh=True)
        while left := meta.size - part.received:
            part.write(buffer[: file.read_into(buffer[: min(left, BLOCK_BYTES)])])
        part.finish()
    except (FileChanged, DiskFailed):
        part.discard()
        raise
    finally:
        file.close()


def free_bytes(destination: Path) -> int | None:
    """Space left where ``destination`` is to lie, in a directory that may not exist yet; ``None`` when nobody
    knows.
    """
    for directory in destination.parents:
        try:
            return disks.free_bytes(directory)
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def _take_spare(path: Path) -> bool:
    """Move a file that is done with to ``path``, to be written over; False when there is none.

    Whoever has files to spare, and nobody else, puts them into ``.spare`` beside the destination. Only plain
    files with no other name are taken: what else lies there may belong to somebody.
    """
    directory = path.parent / SPARE
    try:
        for name in os.listdir(directory):
            spare = directory / name
            found = spare.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_uid == os.geteuid():
                os.replace(spare, path)
                path.chmod(0o600)
                return True
    except OSError:
        # there are none, or somebody was faster: then a file is made
        return False
    return False


def part_path(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")

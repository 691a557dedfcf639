"""Project quotas: the file system itself bounds what the files in a job's directories take.

ext4 and XFS have them where they are mounted with ``prjquota`` (XFS: also ``pquota``), and a process with
CAP_SYS_ADMIN may set them. An executor that wants more gets EDQUOT; files that it has deleted and holds
open count. Whatever is asked of the kernel is read back: where that is not what was set, there is no quota,
and the worker watches instead (:mod:`hypha.worker.limits.usage`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from hypha.files.beneath import directory_below
from hypha.runtime import chance

logger = logging.getLogger(__name__)

#: linux/quota.h
_PROJECT, _GET, _SET, _BLOCK_LIMITS = 2, 0x800007, 0x800008, 1
_QUOTA_BLOCK_BYTES = 1024
#: struct if_dqblk: limits of blocks, bytes in use, limits and number of files, two times; which of them count
_QUOTA = struct.Struct("=8QI4x")
#: linux/fs.h: struct fsxattr (flags, extent size, extents, project, extent size for copies, padding)
_ATTRIBUTES = struct.Struct("=5I8x")
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
_INHERIT = 0x200
#: numbers of projects that this worker takes: far from those that people choose
_FIRST, _LAST = 1 << 24, 1 << 30
_TRIES = 20
_OPTIONS = {"ext4": {"prjquota"}, "xfs": {"prjquota", "pquota"}}


def find_volume(directory: str, mountinfo: str) -> tuple[str, str] | None:
    """The kind and the device of the file system of the absolute path ``directory``, by the text of
    ``/proc/self/mountinfo``; None when it has no project quotas. The last one that is mounted at a place
    hides those before.
    """
    best, found = "", None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        mount_point = before.split(" ")[4].replace("\\040", " ")
        kind, device, options = after.split(" ", 2)
        inside = directory == mount_point or directory.startswith(mount_point.rstrip("/") + "/")
        if inside and len(mount_point) >= len(best):
            enabled = bool(_OPTIONS.get(kind, set()) & set(options.split(",")))
            best, found = mount_point, (kind, device) if enabled else None
    return found


class ProjectQuotas:
    """Those of the file system of a ``kind`` on ``device``. Everything raises OSError where the kernel does
    not do so.
    """

    def __init__(self, kind: str, device: str) -> None:
        self.kind = kind
        self._device = device
        self._quotactl = ctypes.CDLL(None, use_errno=True).quotactl
        self._quotactl.argtypes = (ctypes.c_uint, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)

    def bound(self, directories: Sequence[Path], size_bytes: int) -> int:
        """What comes into the empty ``directories`` takes ``size_bytes`` at most, in all of them together;
        the number of the project, for :meth:`release`.
        """
        project = self._free_number()
        self._set_limit(project, size_bytes)
        try:
            for directory in directories:
                set_project(directory, project)
        except OSError:
            self.release(project)
            raise
        return project

    def used_bytes(self, project: int) -> int:
        return self._read(project)[2]

    def release(self, project: int) -> None:
        """Its files are bounded no longer."""
        with contextlib.suppress(OSError):
            self._set_limit(project, 0)

    def _free_number(self) -> int:
        for _ in range(_TRIES):
            project = chance().randrange(_FIRST, _LAST)
            limit, _, used, *_ = self._read(project)
            if not limit and not used:
                return project
        raise OSError("no number of a project is free")

    def _set_limit(self, project: int, size_bytes: int) -> None:
        blocks = -(-size_bytes // _QUOTA_BLOCK_BYTES)
        self._call(_SET, project, _QUOTA.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, _BLOCK_LIMITS))
        if self._read(project)[0] != blocks:
            raise OSError(f"the limit of project {project} is not what was set")

    def _read(self, project: int) -> tuple[int, ...]:
        return _QUOTA.unpack(self._call(_GET, project, b"\0" * _QUOTA.size))

    def _call(self, command: int, project: int, content: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(content, _QUOTA.size)
        if self._quotactl(command << 8 | _PROJECT, os.fsencode(self._device), project, buffer) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"quotactl of {self._device}: {os.strerror(number)}")
        return buffer.raw


def set_project(directory: Path, project: int) -> None:
    """``directory``, and what comes into it from now on, belong to ``project``; what is in it already does
    not. Raises OSError.
    """
    with directory_below(directory) as descriptor:
        flags, extent, extents, _, copies = _ATTRIBUTES.unpack(_ioctl(descriptor, _GET_ATTRIBUTES))
        changed = _ATTRIBUTES.pack(flags | _INHERIT, extent, extents, project, copies)
        _ioctl(descriptor, _SET_ATTRIBUTES, changed)
        flags, _, _, found, _ = _ATTRIBUTES.unpack(_ioctl(descriptor, _GET_ATTRIBUTES))
    if found != project or not flags & _INHERIT:
        raise OSError(f"{directory} does not belong to project {project} although that was set")


def _ioctl(descriptor: int, request: int, content: bytes = b"\0" * _ATTRIBUTES.size) -> bytes:
    return bytes(fcntl.ioctl(descriptor, request, content))


def usable_quotas(work_dir: Path) -> ProjectQuotas | None:
    """Of the file system of the existing ``work_dir``, tried out; None where it has none, or they are not for
    this process to set. Blocks for a moment.
    """
    if sys.platform != "linux":
        return None
    place = work_dir.resolve()
    try:
        volume = find_volume(str(place), Path("/proc/self/mountinfo").read_text())
    except (OSError, ValueError):
        return None
    if volume is None:
        return None
    trial = place / f".quota-{os.getpid()}"
    try:
        quotas = ProjectQuotas(*volume)
        trial.mkdir()
        quotas.release(quotas.bound([trial], 1 << 20))
    except (OSError, AttributeError) as exc:
        logger.info("%s has project quotas, but they cannot be used here: %s", volume[1], exc)
        return None
    finally:
        with contextlib.suppress(OSError):
            trial.rmdir()
    return quotas

"""Disks: what they say when they are full, where a file will be, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from hypha.files.disks import existing, free_bytes, lock, naming


def test_other_limits_say_what_helps_too() -> None:
    with pytest.raises(OSError, match=r"exceeded; raise the quota.*: 'out'"), naming(Path("out")):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(FileNotFoundError, match=r"^.Errno 2. No such file or directory: 'out'$"):
        with naming(Path("out")):
            open("/nowhere/at/all").close()


def test_the_disk_of_what_is_not_there_yet(tmp_path: Path) -> None:
    assert existing(tmp_path / "not" / "there" / "yet") == tmp_path
    assert existing(tmp_path) == tmp_path
    assert free_bytes(tmp_path) > 0


def test_a_lock_is_shared_or_had_alone(tmp_path: Path) -> None:
    shared = [lock(tmp_path, fcntl.LOCK_SH), lock(tmp_path, fcntl.LOCK_SH)]
    assert lock(tmp_path, fcntl.LOCK_EX) is None
    for handle in shared:
        assert handle is not None
        os.close(handle)
    alone = lock(tmp_path, fcntl.LOCK_EX)
    assert alone is not None
    assert lock(tmp_path, fcntl.LOCK_SH) is None
    os.close(alone)


def test_what_is_locked_is_what_has_the_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    (tmp_path / "set").mkdir()
    (tmp_path / "new").mkdir()

    def replaced_meanwhile(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / "set").rename(tmp_path / "old")
        (tmp_path / "new").rename(tmp_path / "set")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    handle = lock(tmp_path / "set", fcntl.LOCK_SH)
    assert handle is not None
    assert os.path.samestat(os.fstat(handle), (tmp_path / "set").stat())
    assert lock(tmp_path / "set", fcntl.LOCK_EX) is None
    free = lock(tmp_path / "old", fcntl.LOCK_EX)
    assert free is not None
    os.close(free)
    os.close(handle)


def test_where_there_are_no_locks_that_is_told_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def none_here(handle: int, how: int) -> None:
        opened.append(handle)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with pytest.raises(OSError, match="No locks available"):
        lock(tmp_path, fcntl.LOCK_SH)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])

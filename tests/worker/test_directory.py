"""Job directories: private, short sockets, no stale ones, a few failed ones."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hypha.errors import HyphaError, Refused
from hypha.files import beneath
from hypha.worker.jobs.directory import (
    KEPT_FAILURES,
    MAX_SOCKET_PATH_BYTES,
    PARTS,
    JobDirectory,
    remove_stale,
)


def test_everything_is_private(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path / "work")
    for path in (directory.path, *map(directory.part, PARTS)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert directory.path.name.startswith("hypha-")
    directory.remove()
    assert list((tmp_path / "work").iterdir()) == []


def test_socket_of_a_long_path_is_elsewhere_and_is_removed(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    directory = JobDirectory.create(deep)
    elsewhere = directory.socket_path.parent
    assert elsewhere != directory.path
    assert len(os.fsencode(directory.socket_path)) <= MAX_SOCKET_PATH_BYTES
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.socket_path))
    directory.remove()
    assert not elsewhere.exists()


def test_a_long_temporary_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("t" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    directory = JobDirectory.create(tmp_path / ("d" * 100))
    elsewhere = directory.socket_path.parent
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.socket_path))
    directory.remove()
    assert not elsewhere.exists()
    assert list(deep.iterdir()) == []
    monkeypatch.setattr("hypha.worker.jobs.directory._short_places", lambda: [tmp_path / "nowhere", deep])
    with pytest.raises(HyphaError, match="too long"):
        JobDirectory.create(tmp_path / ("d" * 100))
    assert list(deep.iterdir()) == []


def test_stale_directories_are_removed_and_live_ones_are_not(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    script = f"""
from pathlib import Path
from hypha.worker.jobs.directory import JobDirectory
directory = JobDirectory.create(Path({str(deep)!r}))
print(directory.path, directory.socket_path.parent)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    stale, elsewhere = map(Path, done.stdout.split())
    live = JobDirectory.create(deep)
    (deep / "hypha-not-ours").mkdir()
    assert stale.exists()
    assert elsewhere.exists()
    assert remove_stale(deep) == [stale]
    assert not stale.exists()
    assert not elsewhere.exists()
    assert live.path.exists()
    assert (deep / "hypha-not-ours").exists()
    live.remove()
    assert remove_stale(tmp_path / "nothing") == []


def nested(directory: Path, depth: int) -> None:
    """Directories in directories, deeper than any path or stack of calls."""
    descriptor = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("1", dir_fd=descriptor)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
        below = os.open("1", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)


@pytest.mark.parametrize(("end", "depth"), [("removed", 1100), ("kept", 20), ("stale", 20)])
def test_an_executor_cannot_make_what_nobody_can_remove(tmp_path: Path, end: str, depth: int) -> None:
    work = tmp_path / "work"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("stays")
    directories = [JobDirectory.create(work) for _ in range(KEPT_FAILURES + 1 if end == "kept" else 1)]
    for directory in directories:
        nested(directory.part("outgoing"), depth)
        (directory.part("outgoing") / "2").symlink_to(outside)
        closed = directory.part("outgoing") / "3"
        (closed / "inner").mkdir(parents=True)
        (closed / "inner").chmod(0)
        closed.chmod(0)
        if end == "kept":
            directory.keep("")
        elif end == "removed":
            directory.remove()
    if end == "stale":
        # its worker was killed
        os.close(directories[0]._lock)
        assert remove_stale(work) == [directories[0].path]
    assert len(list(work.iterdir())) == (KEPT_FAILURES if end == "kept" else 0)
    assert (outside / "file").read_text() == "stays"


async def test_a_directory_is_sent_only_while_it_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beneath, "MAX_LINKED", 100)
    directory = JobDirectory.create(tmp_path / "work")
    many, deep = directory.part("outgoing") / "many", directory.part("outgoing") / "deep"
    many.mkdir()
    for number in range(beneath.MAX_LINKED):
        (many / str(number)).touch()
    async with directory.pinned("outgoing/many", directory=True) as path:
        assert len(list(path.iterdir())) == beneath.MAX_LINKED
    (many / "one-more").touch()
    deep.mkdir()
    nested(deep, beneath.MAX_DEPTH + 1)
    for name in ("many", "deep"):
        with pytest.raises(Refused, match="more than 100 files"):
            async with directory.pinned(f"outgoing/{name}", True):
                pass
    directory.remove()
    assert list((tmp_path / "work").iterdir()) == []


def test_only_the_newest_failures_are_kept(tmp_path: Path) -> None:
    kept = []
    for number in range(KEPT_FAILURES + 2):
        directory = JobDirectory.create(tmp_path)
        (directory.path / "outgoing" / "x").write_text(str(number))
        (directory.path / "slices" / "big").write_text("x")
        kept.append(directory.keep(f"failure {number}"))
        os.utime(kept[-1], (number, number))
    assert [path.exists() for path in kept] == [False, False] + [True] * KEPT_FAILURES
    assert (kept[-1] / "output.txt").read_text() == f"failure {KEPT_FAILURES + 1}"
    assert not (kept[-1] / "slices").exists()
    assert remove_stale(tmp_path) == []


def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.mkdir()
    (path / "key").write_text("the owner's")
    return path


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("out", False),
        ("away/key", False),
        ("away", True),
        ("outgoing/deep/link", False),
        ("outgoing", False),
        ("outgoing/fifo", False),
        ("outgoing/socket", False),
        ("../secret/key", False),
        ("/etc/passwd", False),
        ("outgoing/../../secret/key", False),
        ("", False),
        (".", True),
        ("a\0b", False),
    ],
)
async def test_what_is_sent_lies_in_the_job_directory_and_no_link_leads_out(
    tmp_path: Path, name: str, whole: bool
) -> None:
    directory = JobDirectory.create(tmp_path / "work")
    owner = secret(tmp_path)
    (directory.path / "out").symlink_to(owner / "key")
    (directory.path / "away").symlink_to(owner)
    (directory.path / "outgoing" / "deep").mkdir()
    (directory.path / "outgoing" / "deep" / "link").symlink_to(owner / "key")
    os.mkfifo(directory.path / "outgoing" / "fifo")
    os.mknod(directory.path / "outgoing" / "socket", stat.S_IFSOCK | 0o600)
    with pytest.raises(Refused):
        async with directory.pinned(name, directory=whole):
            pytest.fail("it was opened")
    directory.remove()
    assert list((tmp_path / "work").iterdir()) == []


async def test_what_is_sent_stays_what_it_was_however_its_name_changes(tmp_path: Path) -> None:
    """Between the moment in which a path is looked at and that in which it is read."""
    directory = JobDirectory.create(tmp_path / "work")
    owner = secret(tmp_path)
    update = directory.path / "outgoing" / "update"
    update.write_text("mine")
    async with directory.pinned("outgoing/update") as pinned:
        update.unlink()
        update.symlink_to(owner / "key")
        assert (pinned.name, pinned.read_text()) == ("update", "mine")
    assert not pinned.exists()
    checkpoint = directory.path / "outgoing" / "checkpoint-1"
    (checkpoint / "deep").mkdir(parents=True)
    (checkpoint / "deep" / "state.json").write_text("{}")
    (checkpoint / "link").symlink_to(owner / "key")
    (checkpoint / "away").symlink_to(owner)
    async with directory.pinned("outgoing/checkpoint-1", directory=True) as pinned:
        names = sorted(path.relative_to(pinned).as_posix() for path in pinned.rglob("*"))
        assert names == ["deep", "deep/state.json"]
    assert (checkpoint / "deep" / "state.json").read_text() == "{}"
    directory.remove()


@pytest.mark.parametrize("part", ["incoming", "artifacts"])
def test_what_comes_in_does_not_follow_a_link_of_the_executor(tmp_path: Path, part: str) -> None:
    directory = JobDirectory.create(tmp_path / "work")
    owner = secret(tmp_path)
    (directory.path / part).rmdir()
    (directory.path / part).symlink_to(owner)
    if part == "incoming":
        received = directory.receiving("key")
        received.write_text("theirs")
        with pytest.raises(Refused, match="incoming/key"):
            directory.deliver(received)
    else:
        with pytest.raises(Refused, match="artifacts/1"), directory.fetching() as fetched:
            (fetched / "key").write_text("theirs")
    assert [path.name for path in owner.iterdir()] == ["key"]
    assert (owner / "key").read_text() == "the owner's"
    directory.remove()


def test_what_is_fetched_is_not_seen_before_it_is_whole(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    with directory.fetching() as fetched:
        (fetched / "config.json").write_text("{}")
        assert list(directory.part("artifacts").iterdir()) == []
    assert (directory.part("artifacts") / "1" / "config.json").read_text() == "{}"
    with pytest.raises(OSError, match="cut"), directory.fetching() as fetched:
        raise OSError("cut")
    assert [path.name for path in directory.part("artifacts").iterdir()] == ["1"]
    directory.remove()


def test_spare_files_of_an_executor_are_its_own(tmp_path: Path) -> None:
    """One that is no plain file of its own would be taken from somebody else, and written over."""
    directory = JobDirectory.create(tmp_path / "work")
    owner = secret(tmp_path)
    (directory.path / "incoming" / ".spare").symlink_to(owner)
    place = directory.receiving("theta")
    assert (owner / "key").read_text() == "the owner's"
    (directory.path / "incoming" / ".spare").unlink()
    (directory.path / "incoming" / ".spare").mkdir()
    for name in ("link", "hard"):
        spare = directory.path / "incoming" / ".spare" / name
        spare.symlink_to(owner / "key") if name == "link" else os.link(owner / "key", spare)
        directory.receiving("theta")
        assert list((place.parent / ".spare").iterdir()) == []
    (directory.path / "incoming" / ".spare" / "1").write_text("old")
    directory.receiving("theta")
    assert (place.parent / ".spare" / "1").read_text() == "old"
    assert (owner / "key").read_text() == "the owner's"
    directory.remove()


def test_the_output_of_a_failed_executor_is_not_written_through_its_link(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path / "work")
    owner = secret(tmp_path)
    (directory.path / "output.txt").symlink_to(owner / "key")
    kept = directory.keep("ssh-ed25519 mine")
    assert (kept / "output.txt").read_text() == "ssh-ed25519 mine"
    assert (owner / "key").read_text() == "the owner's"


def test_what_the_worker_relies_on_is_not_in_the_executors_directory(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path / ("d" * 100))
    mine = tmp_path / "hypha-mine"
    mine.mkdir()
    # as an executor would have another worker's directories removed
    (directory.path / ".lock").touch()
    (directory.path / ".socket-directory").write_text(str(mine))
    assert remove_stale(tmp_path / ("d" * 100)) == []
    assert directory.path.exists()
    assert mine.exists()
    directory.remove()


def test_a_disk_that_takes_no_directory_is_a_refusal_with_a_name(tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    work_dir.write_text("no directory")
    with pytest.raises(Refused, match=r"the job directory .*work.* cannot be made") as refused:
        JobDirectory.create(work_dir)
    assert refused.value.code == "no-space"

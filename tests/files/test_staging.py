"""Files and directories that appear whole or not at all: killed, on a full disk, with a link in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.disks import Disk, small_disks

from hypha.files import staging
from hypha.files.disks import is_disk_full
from hypha.files.staging import (
    StagedDirectory,
    StagedFile,
    move_directory,
    remove_unfinished,
    write_output,
    write_whole,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- killed ----------------------------------------------------------------------------------------------

KILLED_AT_EACH_LINE = """
import os, signal, sys
from pathlib import Path
from hypha.files import staging

target, kind = Path(sys.argv[1]) / "out", sys.argv[2]
traced = {staging.__file__}
if kind.startswith("a dataset"):
    from hypha.data.preparing import staging as datasets

    traced = {datasets.__file__}
if kind.endswith("in two renames"):
    staging.exchange = lambda one, other: False
if kind == "a file written over":
    (target.parent / "old").write_text("a longer one from before")


def replace(content):
    if kind.startswith("a dataset"):
        with datasets.Staging(target, force=True) as made:
            (made.path / "manifest.json").write_text(content)
            made.publish()
    elif kind.startswith("a directory that is moved"):
        staging.move_directory(target.parent / "source", target)
    elif kind.startswith("a directory"):
        with staging.StagedDirectory(target, durable=True) as made:
            made.copy_tree(target.parent / "source")
            made.publish()
    elif kind == "a file written over":
        with staging.StagedFile(target, over=lambda path: (target.parent / "old").rename(path)) as made:
            made.file.write(content.encode())
            made.publish()
    else:
        staging.write_whole(
            target, content.encode(), durable="durable" in kind, exclusive=kind == "a new file"
        )


def found():
    path = target / "manifest.json" if target.is_dir() else target
    return path.read_text() if path.exists() else None


def recovered():
    # what the next process does first
    if kind.startswith("a dataset"):
        datasets.Staging(target, force=True).__exit__(None, None, None)
    elif "directory" in kind:
        staging.StagedDirectory(target).__exit__(None, None, None)
    else:
        staging.StagedFile(target).__exit__()


def killed_at(last, content):
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in traced:
            return None
        if event == "line":
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    replace(content)
    os._exit(0)


content = None
if kind != "a new file":
    content = "0"
    if "directory" in kind or kind.startswith("a dataset"):
        target.mkdir()
        (target / "manifest.json").write_text(content)
    else:
        target.write_text(content)
line, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    line += 1
    if "directory" in kind:
        (target.parent / "source").mkdir(exist_ok=True)
        (target.parent / "source" / "manifest.json").write_text(str(line))
    if kind == "a file written over":
        (target.parent / "old").write_text("a longer one from before")
    child = os.fork()
    if child == 0:
        try:
            killed_at(line, str(line))
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    recovered()
    assert found() in (content, str(line)), (line, found())
    content = found()
    left = set(os.listdir(target.parent)) - {"out", "source", "old"}
    assert not left, (line, left)
    if kind == "a new file" and status:
        target.unlink(missing_ok=True)
        content = None
assert (status, content) == (0, str(line)), (status, content, line)
print(line)
"""


@pytest.mark.parametrize(
    "kind",
    [
        "a file",
        "a durable file",
        "a new file",
        "a file written over",
        "a directory",
        "a directory in two renames",
        "a directory that is moved",
        "a directory that is moved in two renames",
        "a dataset",
    ],
)
def test_what_is_there_survives_that_its_replacement_is_killed_anywhere(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", KILLED_AT_EACH_LINE, str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (10 if kind == "a dataset" else 30)


def test_what_an_earlier_process_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    (tmp_path / ".out.preparing-dead").write_bytes(b"half")
    (tmp_path / ".7.preparing-dead").mkdir()
    (tmp_path / ".7.replaced-dead").mkdir()
    (tmp_path / ".out.part").write_bytes(b"somebody else's")
    with StagedFile(tmp_path / "out") as one, StagedFile(tmp_path / "out") as other:
        one.file.write(b"one")
        other.file.write(b"other")
        one.publish()
        assert (tmp_path / "out").read_bytes() == b"one"
        other.publish()
    assert (tmp_path / "out").read_bytes() == b"other"
    with StagedDirectory(tmp_path / "7") as staged:
        remove_unfinished(tmp_path)
        # what it replaced is kept for as long as nothing is in its place
        assert names(tmp_path) == sorted([".out.part", staged.path.name, "7", "out"])
        (tmp_path / "7").rmdir()
        (tmp_path / ".7.replaced-dead").mkdir()
        remove_unfinished(tmp_path)
        assert ".7.replaced-dead" in names(tmp_path)


@pytest.mark.parametrize("module_name", ["os.open", "fcntl.flock"])
def test_one_that_removes_leftovers_while_another_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module_name: str
) -> None:
    module, name = (os, "open") if module_name == "os.open" else (fcntl, "flock")
    real = getattr(module, name)

    def overtaken(*arguments: object) -> object:
        monkeypatch.setattr(module, name, real)
        result = real(*arguments) if name == "open" else None
        remove_unfinished(tmp_path)
        return result if name == "open" else real(*arguments)

    monkeypatch.setattr(module, name, overtaken)
    with StagedFile(tmp_path / "out") as staged:
        staged.file.write(b"all")
        staged.publish()
    assert (tmp_path / "out").read_bytes() == b"all"
    assert names(tmp_path) == ["out"]


def test_where_there_are_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    (tmp_path / ".out.preparing-1").write_bytes(b"")
    write_whole(tmp_path / "out", b"all")
    with StagedDirectory(tmp_path / "directory") as staged:
        staged.publish()
    assert names(tmp_path) == [".out.preparing-1", "directory", "out"]


# --- as it was asked for ----------------------------------------------------------------------------------


def test_left_without_publishing_nothing_has_changed(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"before")
    with StagedFile(tmp_path / "out") as staged:
        staged.file.write(b"half")
    with StagedDirectory(tmp_path / "new") as directory:
        (directory.path / "file").write_bytes(b"half")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"before"


def test_modes_and_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "by the umask", b"")
        with StagedFile(tmp_path / "for all", mode=0o644) as staged:
            assert stat.S_IMODE(staged.staged.stat().st_mode) == 0o600
            staged.publish()
        with StagedDirectory(tmp_path / "directory") as directory:
            directory.publish()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"by the umask": 0o640, "for all": 0o644, "directory": 0o750}


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_never_put_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def none_here(*arguments: object, **options: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not links:
        monkeypatch.setattr("hypha.files.staging.os.link", none_here)
    write_whole(tmp_path / "new", b"first", exclusive=True)
    with pytest.raises(OSError, match="new"):
        write_whole(tmp_path / "new", b"second", exclusive=True)
    assert (tmp_path / "new").read_bytes() == b"first"
    assert names(tmp_path) == ["new"]


def test_a_long_name_leaves_space_for_what_is_added(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125)
    write_whole(path, b"all")
    assert path.read_bytes() == b"all"


def test_directories_change_names_at_once(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not staging.exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system cannot exchange two names")
    assert [(tmp_path / name / "file").read_text() for name in ("one", "other")] == ["other", "one"]
    assert not staging.exchange(tmp_path / "one", tmp_path / "absent")
    assert (tmp_path / "one" / "file").read_text() == "other"


def test_a_directory_that_is_not_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with StagedDirectory(tmp_path / "out") as staged:
        (staged.path / "file").write_bytes(b"new")
        (tmp_path / "out" / "file").write_bytes(b"old")
        with pytest.raises(OSError, match="out"):
            staged.publish(replace=False)
    assert (tmp_path / "out" / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]


# --- links, and what else may be in the way -----------------------------------------------------------------


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "out").symlink_to("secret")
    (tmp_path / ".out.preparing-link").symlink_to("secret")
    write_whole(tmp_path / "out", b"all", mode=0o644)
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert not (tmp_path / "out").is_symlink()
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("directory")
    with StagedDirectory(tmp_path / "link") as staged, pytest.raises(NotADirectoryError, match="link"):
        staged.publish()
    with pytest.raises(NotADirectoryError):
        move_directory(tmp_path / "directory", tmp_path / "out")
    assert (tmp_path / "directory" / "file").read_bytes() == b"kept"


def test_a_device_or_a_fifo_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("fifo", "link"):
        with pytest.raises(OSError, match="no regular file"):
            write_whole(tmp_path / name, b"all")
    assert names(tmp_path) == ["fifo", "link"]


def test_what_a_user_wants_to_have_is_written_where_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    write_output(tmp_path / "link", "all")
    assert (tmp_path / "elsewhere").read_text() == "all"
    (tmp_path / "device").symlink_to("/dev/null")
    write_output(tmp_path / "device", "all")
    assert names(tmp_path) == ["device", "elsewhere", "link"]
    assert (tmp_path / "link").is_symlink()


# --- disks -------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small disk")
    with small_disks(tmp_path, "disk", megabytes=4) as (disk,):
        yield disk


def test_a_full_disk_is_told_by_the_file_and_what_to_do(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(bytes(3 << 20))
    out = disk.path / "out"
    write_whole(out, b"before")
    disk.fill()
    told = re.escape(f"No space left on device; make space on that disk: '{out}")
    for size in (1, 1 << 20):
        with pytest.raises(OSError, match=told + "'") as failed:
            write_whole(out, bytes(size), durable=True)
        assert is_disk_full(failed.value)
    with pytest.raises(OSError, match=told + "/file'"), StagedDirectory(out) as staged:
        staged.copy_tree(tmp_path / "source")
    assert out.read_bytes() == b"before"
    assert names(disk.path) == ["filler", "out"]
    disk.make_space()
    write_whole(out, b"after")
    assert out.read_bytes() == b"after"

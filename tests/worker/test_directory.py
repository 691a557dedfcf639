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
from hypha.worker.directory import KEPT_FAILURES, MAX_SOCKET_PATH_BYTES, PARTS, JobDirectory, remove_stale


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
    monkeypatch.setattr("hypha.worker.directory._short_places", lambda: [tmp_path / "nowhere", deep])
    with pytest.raises(HyphaError, match="too long"):
        JobDirectory.create(tmp_path / ("d" * 100))
    assert list(deep.iterdir()) == []


def test_stale_directories_are_removed_and_live_ones_are_not(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    script = f"""
from pathlib import Path
from hypha.worker.directory import JobDirectory
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


def test_inside_follows_links_only_within(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    (directory.path / "outgoing" / "file").write_text("x")
    (directory.path / "link").symlink_to("outgoing/file")
    assert directory.inside("link") == directory.path / "outgoing" / "file"
    (tmp_path / "secret").write_text("x")
    (directory.path / "out").symlink_to("../secret")
    with pytest.raises(Refused, match="leaves"):
        directory.inside("out")
    with pytest.raises(Refused, match="no regular file"):
        directory.inside("outgoing")
    assert directory.inside("outgoing", directory=True) == directory.path / "outgoing"
    (directory.path / "away").symlink_to(tmp_path)
    with pytest.raises(Refused, match="leaves"):
        directory.inside("away", directory=True)
    directory.remove()


def test_a_disk_that_takes_no_directory_is_a_refusal_with_a_name(tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    work_dir.write_text("no directory")
    with pytest.raises(Refused, match=r"the job directory .*work.* cannot be made") as refused:
        JobDirectory.create(work_dir)
    assert refused.value.code == "no-space"

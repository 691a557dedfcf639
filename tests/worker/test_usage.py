"""What an executor has on the disk and how many processes it is, counted for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import trio
import trio.testing

from hypha.messages import Resources
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.limits import LOOK_S, Limits, Means
from hypha.worker.limits.usage import Excess, Quota, count_tasks, disk_usage, excess

MB = 10**6


def test_files_count_once_and_cached_slices_not_at_all(tmp_path: Path) -> None:
    job, own, cache = (tmp_path / name for name in ("job", "own", "cache"))
    for directory in (job / "slices", job / "deep" / "er", own, cache):
        directory.mkdir(parents=True)
    empty = disk_usage((job, own), job / "slices")
    (cache / "slice").write_bytes(b"x" * 3 * MB)
    os.link(cache / "slice", job / "slices" / "slice")
    assert disk_usage((job, own), job / "slices") == empty
    (job / "deep" / "er" / "file").write_bytes(b"x" * MB)
    os.link(job / "deep" / "er" / "file", own / "same")
    (job / "link").symlink_to("/etc")
    used = disk_usage((job, own), job / "slices") - empty
    assert MB <= used < 1.1 * MB
    (job / "slices" / "its-own").write_bytes(b"x" * MB)
    assert disk_usage((job, own), job / "slices") - empty - used >= MB
    # a file of holes takes no room
    with (job / "sparse").open("wb") as file:
        file.truncate(10**12)
    assert disk_usage((job, own), job / "slices") - empty < 3 * MB


def test_what_is_too_much_is_said_with_what_helps() -> None:
    quota = Quota(disk_bytes=MB, processes=3)
    assert excess(quota, MB, 3) is None
    assert excess(Quota(), 10**15, 10**6) is None
    full = excess(quota, 2 * MB, 9)
    assert full is not None
    assert full.kind == "disk"
    assert "resources.worker.storage" in full.message
    many = excess(quota, 0, 4)
    assert many is not None
    assert "4 processes and threads, and may have 3" in many.message


def test_processes_and_threads_are_counted() -> None:
    script = (
        "import subprocess, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            # below this process there are others of the test run, too
            assert count_tasks(process.pid) == 1
            assert count_tasks(os.getpid()) >= 3
        finally:
            for pid in (*map(int, _children(process.pid)), process.pid):
                os.kill(pid, 9)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


async def test_an_excess_is_found_and_without_a_quota_nobody_looks(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    directory = JobDirectory.create(tmp_path)
    told: list[Excess] = []
    means = Means("rlimit", max_processes=0)
    await Limits(means, "x", Resources(), directory=directory).watch(told.append)
    assert (trio.current_time(), told) == (0, [])
    (directory.path / "file").write_bytes(b"x" * MB)
    await Limits(means, "x", Resources(storage=0.0005), directory=directory).watch(told.append)
    assert [one.kind for one in told] == ["disk"]
    assert trio.current_time() == LOOK_S
    directory.remove()

"""One executor and its lease, with real processes: what no kernel bounds here is watched, and ends it."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import trio

from hypha.config.environment import child_environment
from hypha.messages import Resources
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.gpus import Gpu, GpuShare
from hypha.worker.limits.limits import Limits, Means
from hypha.worker.limits.usage import Excess
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, run_executor

FILLS = """
    import time
    open("outgoing/full", "wb").write(b"x" * 3_000_000)
    print("filled", flush=True)
    time.sleep(60)
"""
STARTS_THREADS = """
    import threading, time
    for _ in range(20): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    time.sleep(60)
"""
FITS = """
    open("outgoing/some", "wb").write(b"x" * 300_000)
    raise SystemExit(7)
"""


async def run(directory: JobDirectory, limits: Limits, script: str) -> tuple[Exit, list[Excess]]:
    """As an execution does."""
    argv = (sys.executable, "-c", textwrap.dedent(script))
    launch = Launch("job", argv, limits.environment(child_environment()), directory.path)
    kill, told = trio.Event(), list[Excess]()

    def exceeded(excess: Excess) -> None:
        told.append(excess)
        kill.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(limits.watch, exceeded)
        with trio.fail_after(30):
            ended = await run_executor(limits.launch(launch), trio.Event(), 1.0, kill=kill)
        nursery.cancel_scope.cancel()
    limits.judge(ended.code != 0 and not ended.stopped)
    await limits.remove()
    return ended, told


@pytest.mark.parametrize(
    ("script", "resource", "text"),
    [
        (FILLS, "disk", "disk quota exceeded: its files in the job directory take 0.003"),
        (STARTS_THREADS, "processes", "it had 21 processes and threads, and may have 9"),
    ],
)
async def test_too_much_is_ended_and_told(tmp_path: Path, script: str, resource: str, text: str) -> None:
    directory = JobDirectory.create(tmp_path)
    means = Means(mode="rlimit", max_processes=9)
    limits = Limits(means, "hypha-x", Resources(storage=0.001), GpuShare(), directory)
    ended, told = await run(directory, limits, script)
    directory.remove()
    assert (ended.code, ended.stopped) == (-9, False)
    assert [one.resource for one in told] == [resource]
    assert text in told[0].message
    assert limits.excess == told[0]


async def test_what_fits_is_nobodys_business(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    limits = Limits(Means(mode="rlimit"), "hypha-x", Resources(storage=0.001), GpuShare(), directory)
    ended, told = await run(directory, limits, FITS)
    directory.remove()
    assert (ended.code, told, limits.excess) == (7, [], None)


def test_its_environment_names_its_own_gpus(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    gpus = tuple(Gpu("nvidia", name, "A10", 24 * 10**9, "here") for name in "0123")
    share = GpuShare((2, 3), 12.0)
    limits = Limits(Means(gpus=gpus), "hypha-x", Resources(cpu=2), share, directory)
    inherited = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "PATH": "/bin", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    found = limits.environment(inherited)
    directory.remove()
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert found["HYPHA_GPU_MEMORY_BYTES"] == "12000000000"
    assert (found["PATH"], found["OMP_NUM_THREADS"]) == ("/bin", "2")
    assert found["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST", "as the owner wants it"

"""Readings of the machine: true ones, in a thread, and only for those who look."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import trio
import trio.testing
from tests.support.polling import until
from tests.support.signals import Signals, signals

from hypha.runtime import free_bytes
from hypha.telemetry import instruments as metrics
from hypha.telemetry.resources import LEAST_S, Sampler, Shown, watch_disks, watch_machine, watch_process

__all__ = ["signals"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child of its own, each of which holds 40 MB."""
    script = (
        "import subprocess, sys; held = b'x' * 40_000_000\n"
        "if len(sys.argv) > 1: subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        yield process
        for one in psutil.Process(process.pid).children():
            one.kill()
        process.kill()


async def test_the_machine_and_the_process_trees_of_executors(
    signals: Signals, child: subprocess.Popen[bytes]
) -> None:
    async with watch_machine(lambda: {child.pid: "train", 1 << 30: "aggregate"}):
        await until(lambda: signals.reading(metrics.EXECUTOR_MEMORY, kind="train") > 80_000_000)
        # a process that is gone holds nothing
        assert signals.reading(metrics.EXECUTOR_MEMORY, kind="aggregate") == 0
        used = signals.reading(metrics.MEMORY_USED)
        free = signals.reading(metrics.SYSTEM_MEMORY, **{"system.memory.state": "free"})
        assert 0 < used < psutil.virtual_memory().total
        assert used + free == psutil.virtual_memory().total
        assert 0 <= signals.reading(metrics.CPU_UTILIZATION) <= 1
        assert signals.readings(metrics.SYSTEM_CPU) == signals.readings(metrics.CPU_UTILIZATION)
    assert not signals.readings(metrics.MEMORY_USED)


async def test_a_busy_machine_shows_it(signals: Signals) -> None:
    spinning = True

    def spin() -> None:
        while spinning:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        async with watch_machine(dict):
            await until(lambda: signals.reading(metrics.CPU_UTILIZATION) > 0.2 / (psutil.cpu_count() or 1))
    finally:
        spinning = False
        thread.join()


async def test_gpus_are_shown_by_both_names(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library as it answers; the second GPU has fallen off its bus."""

    class NVMLError(Exception):
        pass

    def utilization(handle: int) -> SimpleNamespace:
        if handle:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(gpu=37)

    library = ModuleType("pynvml")
    answers: dict[str, object] = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetUtilizationRates": utilization,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=5_000, total=80_000_000_000),
    }
    vars(library).update(answers)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    async with watch_machine(dict):
        await until(lambda: bool(signals.readings(metrics.GPU_UTILIZATION)))
        assert signals.readings(metrics.GPU_UTILIZATION) == {frozenset({("gpu", "0")}): 0.37}
        assert signals.readings(metrics.GPU_MEMORY_USED) == {frozenset({("gpu", "0")}): 5_000}
        assert signals.readings(metrics.HW_GPU_UTILIZATION) == {frozenset({("hw.id", "GPU-0")}): 0.37}
        assert signals.readings(metrics.HW_GPU_MEMORY) == {frozenset({("hw.id", "GPU-0")}): 5_000}


@pytest.mark.parametrize("installed", [True, False])
async def test_a_machine_without_a_gpu_shows_none(
    signals: Signals, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    elif Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has one")
    async with watch_machine(dict):
        await until(lambda: signals.reading(metrics.MEMORY_USED) > 0)
        assert not signals.readings(metrics.GPU_UTILIZATION)


async def test_disks_are_shown_by_place_and_the_fullest_counts(
    signals: Signals, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = {"work_dir": [tmp_path], "datasets": [tmp_path, Path("/dev/shm")]}
    async with watch_disks(places):
        await until(lambda: signals.reading(metrics.DISK_FREE, place="work_dir") > 0)
        least = min(free_bytes(tmp_path), free_bytes(Path("/dev/shm")))
        assert signals.reading(metrics.DISK_FREE, place="datasets") == pytest.approx(least, rel=0.05)
    async with watch_disks({"state_dir": [tmp_path / "gone"]}):
        await until(
            lambda: signals.reading(metrics.DISK_FREE, place="state_dir") == 0 and bool(caplog.records)
        )
        assert not signals.readings(metrics.DISK_FREE)
    assert len([one for one in caplog.records if "cannot be read" in one.message]) == 1


async def test_a_reading_that_hangs_holds_nothing_up() -> None:
    hanging = threading.Event()

    def read() -> Shown:
        hanging.wait()
        return {}

    sampler = Sampler(read)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sampler.run)
            assert not sampler.latest(metrics.MEMORY_USED)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not sampler.latest(metrics.MEMORY_USED)
            nursery.cancel_scope.cancel()
    hanging.set()


async def test_this_process_is_shown(signals: Signals) -> None:
    with watch_process():
        assert signals.reading(metrics.PROCESS_MEMORY) == pytest.approx(
            psutil.Process().memory_info().rss, rel=0.1
        )
        assert signals.reading(metrics.CLOCK) > 1.7e9
        signals.reading(metrics.PROCESS_CPU)
        until_s = trio.current_time() + 2 * LEAST_S
        while trio.current_time() < until_s:
            sum(number * number for number in range(10**5))
            # who looks more often does not make it a measure of a moment
            share = signals.reading(metrics.PROCESS_CPU)
        assert 0 < share < 5


def test_nothing_is_read_or_imported_while_nobody_looks() -> None:
    script = """
import sys, trio
from pathlib import Path
from hypha.telemetry.resources import watch_disks, watch_machine, watch_process

def groups():
    raise AssertionError("nobody looked")

async def main():
    async with watch_machine(groups), watch_disks({"work_dir": [Path("/nowhere")]}):
        with watch_process():
            await trio.sleep(0.05)

trio.run(main)
assert not {"psutil", "pynvml"} & set(sys.modules), sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)

"""What a machine's cores, memory, disks and GPUs do, as gauges: ours, and OpenTelemetry's names beside them.

Readings that may take a moment (process trees, drivers, a disk behind a network) are taken in a thread, and
only when somebody has looked at the last ones: while nobody exports metrics nothing is read, and neither
psutil nor NVIDIA's library is imported.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hypha.runtime import free_bytes, in_thread, wall_time
from hypha.telemetry import instruments as metrics
from hypha.telemetry.metrics import Gauge, Reading

logger = logging.getLogger("hypha.telemetry")

#: a share of processor time is measured over so many seconds at least
LEAST_S = 0.5

#: what is shown of a machine at one moment
Shown = Mapping[Gauge, Sequence[Reading]]


class Sampler:
    """Has ``read`` called in a thread each time :meth:`latest` was asked; one call at a time."""

    def __init__(self, read: Callable[[], Shown]) -> None:
        self._read = read
        self._asked = trio.Event()
        self._latest: Shown = {}
        self._warned = False

    def latest(self, gauge: Gauge) -> Sequence[Reading]:
        """Of the newest reading; nothing before the first one, and after one that failed."""
        self._asked.set()
        return self._latest.get(gauge, ())

    async def run(self) -> None:
        """Read until cancelled; a reading that hangs does not hold that up."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            try:
                self._latest = await in_thread(self._read, abandon_on_cancel=True)
            except Exception as exc:  # noqa: BLE001 - whatever a driver raises must not end the node
                self._latest = {}
                if not self._warned:
                    logger.warning("The machine's resources cannot be read: %r", exc)
                self._warned = True


@contextlib.asynccontextmanager
async def _sampling(read: Callable[[], Shown], *gauges: Gauge) -> AsyncIterator[None]:
    """Have ``gauges`` show what ``read`` reads meanwhile."""
    sampler = Sampler(read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampler.run)
        with contextlib.ExitStack() as stack:
            for gauge in gauges:
                stack.enter_context(gauge.watch(partial(sampler.latest, gauge)))
            yield
        nursery.cancel_scope.cancel()


# --- disks ---------------------------------------------------------------------------------------------


def watch_disks(places: Mapping[str, Iterable[Path]]) -> AbstractAsyncContextManager[None]:
    """Show the free space of ``places`` (``work_dir``, ``state_dir``, ``datasets``) meanwhile; of several
    directories that of the fullest.
    """
    directories = {place: tuple(paths) for place, paths in places.items()}

    def read() -> Shown:
        return {
            metrics.DISK_FREE: [
                ({"place": place}, min(map(free_bytes, paths)))
                for place, paths in directories.items()
                if paths
            ]
        }

    return _sampling(read, metrics.DISK_FREE)


# --- this process --------------------------------------------------------------------------------------


@contextlib.contextmanager
def watch_process() -> Iterator[None]:
    """Show this process, and the machine's time of day, meanwhile. Entered once a process."""
    found: list[Any] = []
    cpu, measured_at = 0.0, -math.inf

    def share() -> float:
        """Of the time since it was measured: not each time that somebody looks, as it comes in ticks."""
        nonlocal cpu, measured_at
        now = trio.current_time()
        if now - measured_at >= LEAST_S:
            cpu, measured_at = float(process().cpu_percent()) / 100, now
        return cpu

    def process() -> Any:
        if not found:
            import psutil

            found.append(psutil.Process())
            found[0].cpu_percent()  # since when the first reading counts
        return found[0]

    with (
        metrics.CLOCK.watch(wall_time),
        metrics.PROCESS_CPU.watch(share),
        metrics.PROCESS_MEMORY.watch(lambda: float(process().memory_info().rss)),
    ):
        yield


# --- the machine of a worker ---------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuReading:
    """A GPU: its number, its driver's identifier, what share of the time it computes, bytes in use, bytes
    that there are, and its model.
    """

    index: str
    identifier: str
    utilization: float
    used_bytes: int
    total_bytes: int
    model: str = ""


def watch_machine(groups: Callable[[], Mapping[int, str]]) -> AbstractAsyncContextManager[None]:
    """Show the machine, and the executors in ``groups``, meanwhile: leading process -> kind."""
    return _sampling(
        _Machine(groups).read,
        metrics.CPU_UTILIZATION,
        metrics.SYSTEM_CPU,
        metrics.MEMORY_USED,
        metrics.SYSTEM_MEMORY,
        metrics.EXECUTOR_MEMORY,
        metrics.GPU_UTILIZATION,
        metrics.GPU_MEMORY_USED,
        metrics.HW_GPU_UTILIZATION,
        metrics.HW_GPU_MEMORY,
    )


class _Machine:
    def __init__(self, groups: Callable[[], Mapping[int, str]]) -> None:
        self._groups = groups
        self._gpus = _Gpus()
        self._before: Any = None

    def read(self) -> Shown:
        """The share of all cores since the last reading, and what there is now. Blocks."""
        import psutil

        memory, times = psutil.virtual_memory(), psutil.cpu_times()
        before, self._before = self._before, times
        cpu, used = _busy_share(before, times), memory.total - memory.available
        held: dict[str, int] = dict.fromkeys(("train", "aggregate"), 0)
        for leader, kind in self._groups().items():
            held[kind] = held.get(kind, 0) + _resident(psutil, leader)
        gpus = self._gpus.read()
        # ours count GPUs, OpenTelemetry's name them as their driver does
        return {
            metrics.CPU_UTILIZATION: [({}, cpu)],
            metrics.SYSTEM_CPU: [({}, cpu)],
            metrics.MEMORY_USED: [({}, used)],
            metrics.SYSTEM_MEMORY: [
                ({"system.memory.state": "used"}, used),
                ({"system.memory.state": "free"}, memory.available),
            ],
            metrics.EXECUTOR_MEMORY: [({"kind": kind}, size) for kind, size in held.items()],
            metrics.GPU_UTILIZATION: [({"gpu": gpu.index}, gpu.utilization) for gpu in gpus],
            metrics.GPU_MEMORY_USED: [({"gpu": gpu.index}, gpu.used_bytes) for gpu in gpus],
            metrics.HW_GPU_UTILIZATION: [({"hw.id": gpu.identifier}, gpu.utilization) for gpu in gpus],
            metrics.HW_GPU_MEMORY: [({"hw.id": gpu.identifier}, gpu.used_bytes) for gpu in gpus],
        }


def _busy_share(before: Any, now: Any) -> float:
    """Of all cores between two ``cpu_times``; 0 where there is only one."""
    if before is None:
        return 0.0
    idle = (now.idle + getattr(now, "iowait", 0.0)) - (before.idle + getattr(before, "iowait", 0.0))
    # guest time is within user time already
    parts = [name for name in now._fields if name not in ("guest", "guest_nice")]
    total = sum(getattr(now, name) - getattr(before, name) for name in parts)
    return min(1.0, max(0.0, 1.0 - idle / total)) if total > 0 else 0.0


def _resident(psutil: Any, leader: int) -> int:
    """Bytes that ``leader`` and its descendants hold."""
    held = 0
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(leader)
        for process in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                held += process.memory_info().rss
    return held


class _Gpus:
    """NVIDIA's, where ``nvidia-ml-py`` is installed and a driver is there; else none."""

    def __init__(self) -> None:
        self._library: Any = None
        self._devices: list[tuple[str, str, str, Any]] | None = None

    def read(self) -> tuple[GpuReading, ...]:
        if self._devices is None:
            self._devices = self._find()
        found = []
        for index, identifier, model, handle in self._devices:
            with contextlib.suppress(self._library.NVMLError):
                memory = self._library.nvmlDeviceGetMemoryInfo(handle)
                share = self._library.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                used, total = int(memory.used), int(memory.total)
                found.append(GpuReading(index, identifier, share, used, total, model))
        return tuple(found)

    def _find(self) -> list[tuple[str, str, str, Any]]:
        try:
            import pynvml
        except ImportError:
            return []
        devices = []
        try:
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                identifier, model = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
                devices.append((str(index), str(identifier), str(model), handle))
        except pynvml.NVMLError as exc:
            logger.debug("No GPU is read: %s", exc)
            return []
        self._library = pynvml
        return devices


def read_gpus() -> tuple[GpuReading, ...]:
    """This machine's GPUs now; blocks for a moment."""
    return _Gpus().read()

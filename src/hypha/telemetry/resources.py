"""What a machine's cores, memory, disks and GPUs do, as gauges: ours, and OpenTelemetry's names beside them.

Readings that may take a moment (process trees, drivers, a disk behind a network) are taken in a thread, and
only when somebody has looked at the last ones: while nobody exports metrics nothing is read, and neither
psutil nor NVIDIA's library is imported.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import trio

from hypha.runtime import free_bytes, in_thread, wall_time
from hypha.telemetry import instruments as metrics
from hypha.telemetry.metrics import Gauge, Reading

logger = logging.getLogger("hypha.telemetry")

#: a share of processor time is measured over so many seconds at least
LEAST_S = 0.5

T = TypeVar("T")


class Sampler(Generic[T]):
    """Has ``read`` called in a thread each time :meth:`latest` was asked; one call at a time."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._asked = trio.Event()
        self._latest: T | None = None
        self._warned = False

    def latest(self) -> T | None:
        """The newest reading; None before the first one, and after one that failed."""
        self._asked.set()
        return self._latest

    async def run(self) -> None:
        """Read until cancelled; a reading that hangs does not hold that up."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            try:
                self._latest = await in_thread(self._read, abandon_on_cancel=True)
            except Exception as exc:  # noqa: BLE001 - whatever a driver raises must not end the node
                self._latest = None
                if not self._warned:
                    logger.warning("The machine's resources cannot be read: %r", exc)
                self._warned = True


@contextlib.asynccontextmanager
async def _sampling(read: Callable[[], T]) -> AsyncIterator[Sampler[T]]:
    sampler = Sampler(read)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sampler.run)
        yield sampler
        nursery.cancel_scope.cancel()


# --- disks ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def watch_disks(places: Mapping[str, Iterable[Path]]) -> AsyncIterator[None]:
    """Show the free space of ``places`` (``work_dir``, ``state_dir``, ``datasets``) meanwhile; of several
    directories that of the fullest.
    """
    directories = {place: tuple(paths) for place, paths in places.items()}

    def read() -> dict[str, int]:
        return {
            place: min(free_bytes(path) for path in paths) for place, paths in directories.items() if paths
        }

    async with _sampling(read) as sampler:
        with metrics.DISK_FREE.watch(
            lambda: [({"place": place}, free) for place, free in (sampler.latest() or {}).items()]
        ):
            yield


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


@dataclass(frozen=True)
class MachineReading:
    """``cpu`` is the share of all cores since the last reading, ``executor_bytes`` what process groups of
    each kind hold.
    """

    cpu: float
    used_bytes: int
    free_bytes: int
    executor_bytes: Mapping[str, int] = field(default_factory=dict)
    gpus: tuple[GpuReading, ...] = ()


class MachineReader:
    """Reads the machine. ``groups`` gives the leading processes of executors, and their kinds. Blocks."""

    def __init__(self, groups: Callable[[], Mapping[int, str]]) -> None:
        self._groups = groups
        self._gpus = _Gpus()
        self._before: Any = None

    def __call__(self) -> MachineReading:
        import psutil

        memory, times = psutil.virtual_memory(), psutil.cpu_times()
        before, self._before = self._before, times
        held: dict[str, int] = dict.fromkeys(("train", "aggregate"), 0)
        for leader, kind in self._groups().items():
            held[kind] = held.get(kind, 0) + _resident(psutil, leader)
        return MachineReading(
            cpu=_busy_share(before, times),
            used_bytes=memory.total - memory.available,
            free_bytes=memory.available,
            executor_bytes=held,
            gpus=self._gpus.read(),
        )


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
    held, left = 0, [leader]
    while left:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(left.pop())
            left += _children(process)
            held += process.memory_info().rss
    return held


def _children(process: Any) -> list[int]:
    """Linux says whose children those of each thread are; elsewhere every process is looked at."""
    try:
        threads = list(Path(f"/proc/{process.pid}/task").iterdir())
        return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
    except FileNotFoundError:
        return [child.pid for child in process.children()]


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


@contextlib.asynccontextmanager
async def watch_machine(groups: Callable[[], Mapping[int, str]]) -> AsyncIterator[None]:
    """Show the machine, and the executors in ``groups``, meanwhile: leading process -> kind."""
    async with _sampling(MachineReader(groups)) as sampler:

        def read(of: Callable[[MachineReading], Iterable[Reading]]) -> Iterable[Reading]:
            reading = sampler.latest()
            return [] if reading is None else of(reading)

        with contextlib.ExitStack() as stack:
            for gauge, of in _SHOWN.items():
                stack.enter_context(gauge.watch(partial(read, of)))
            yield


#: ours count GPUs, OpenTelemetry's name them as their driver does
_SHOWN: Mapping[Gauge, Callable[[MachineReading], Iterable[Reading]]] = {
    metrics.CPU_UTILIZATION: lambda now: [({}, now.cpu)],
    metrics.SYSTEM_CPU: lambda now: [({}, now.cpu)],
    metrics.MEMORY_USED: lambda now: [({}, now.used_bytes)],
    metrics.SYSTEM_MEMORY: lambda now: [
        ({"system.memory.state": "used"}, now.used_bytes),
        ({"system.memory.state": "free"}, now.free_bytes),
    ],
    metrics.EXECUTOR_MEMORY: lambda now: [
        ({"kind": kind}, held) for kind, held in now.executor_bytes.items()
    ],
    metrics.GPU_UTILIZATION: lambda now: [({"gpu": gpu.index}, gpu.utilization) for gpu in now.gpus],
    metrics.GPU_MEMORY_USED: lambda now: [({"gpu": gpu.index}, gpu.used_bytes) for gpu in now.gpus],
    metrics.HW_GPU_UTILIZATION: lambda now: [
        ({"hw.id": gpu.identifier}, gpu.utilization) for gpu in now.gpus
    ],
    metrics.HW_GPU_MEMORY: lambda now: [({"hw.id": gpu.identifier}, gpu.used_bytes) for gpu in now.gpus],
}

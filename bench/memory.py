"""Peak memory of the parameter server with 100 MB of fp32 parameters, for 2 and for 8 workers.

Whole jobs on real processes, with checkpoints and the export at the end. The peak is what the kernel
counted for the server's process (VmHWM: everything resident, libraries and mapped files included); it only
grows, and the last look is taken moments before the process ends.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import trio
from tests.support.faults import executors

from bench.jobs import Rig, open_rig
from bench.report import Bound, Report, Row

MATRICES, SIDE = 25, 1000
MEGABYTES = 4 * MATRICES * SIDE * SIDE / 1e6
FEW, MANY = 2, 8
ROUNDS = 3
LIMIT_MB = 800.0
LOOK_S = 0.01


async def peak_mb(rig: Rig, workers: int) -> float:
    """Run a job; the parameter server's peak."""
    server = next(child for child in rig.system.group.running if child.name == "server")
    peak_kb = 0

    async def look() -> None:
        nonlocal peak_kb
        while True:
            for pid in executors(server, "parameter_server"):
                peak_kb = max(peak_kb, _high_water_kb(pid))
            await trio.sleep(LOOK_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        model = {"entrypoint": "bench.models:stack", "arguments": {"count": MATRICES, "side": SIDE}}
        # long enough a deadline for eight trainers on two cores
        rounds = {"update_rounds": ROUNDS, "inner_steps": 1, "deadline_s": 300}
        await rig.run(model, rounds, workers)
        nursery.cancel_scope.cancel()
    if not peak_kb:
        raise RuntimeError("the parameter server was never seen")
    return peak_kb * 1024 / 1e6


def _high_water_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(next((line.split()[1] for line in lines if line.startswith("VmHWM")), 0))


async def measure(directory: Path) -> tuple[float, float]:
    """Peaks with few and with many workers, in the same network."""
    data = np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32)
    async with open_rig(directory, MANY, {"x": data}) as rig:
        return await peak_mb(rig, FEW), await peak_mb(rig, MANY)


def main() -> int:
    """Measure; returns the exit code."""
    report = Report("memory")
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
        few, many = trio.run(measure, Path(name))
    note = f"{MEGABYTES:.0f} MB of parameters, {ROUNDS} rounds"
    for workers, peak in ((FEW, few), (MANY, many)):
        report.add(Row(f"peak, {workers} workers", peak, "MB", bound=Bound("<=", LIMIT_MB), note=note))
    report.add(
        Row(
            name="the same for both",
            value=many,
            unit="MB",
            reference=few,
            bound=Bound("<=", 1.05),
            note="one update more in memory would be a seventh more",
        )
    )
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

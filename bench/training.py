"""Training through Hypha with one worker, against the same loop alone: samples/s between synchronisations.

The loop alone is what a person would write: the same model, data, batch size, AdamW and threads in a
process of its own, and nobody else at work. In both one clock, that of :mod:`bench.models`, says when a
round's first forward pass begins and its last step ends. Through Hypha, gateway, data node, scheduler,
parameter server and the worker itself share the machine with the trainer, and slices arrive meanwhile.
Blocks of the two are interleaved, medians of rounds compared. Long steps have the bound; short ones, where
a fixed cost a step weighs more, are reported.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from bench.jobs import Course, Rig, Round, cut, open_rig, read_times
from bench.models import TIMES
from bench.report import Bound, Report, Row

LENGTH = 64
SAMPLES = 16384
BLOCKS = 6


@dataclass(frozen=True)
class Case:
    """A model, and how long its rounds are."""

    name: str
    width: int
    layers: int
    batch_size: int
    #: batches a round
    inner_steps: int
    rounds: int
    bound: Bound | None = None

    @property
    def arguments(self) -> dict[str, int]:
        """Of ``bench.models:transformer``."""
        return {
            "width": self.width,
            "layers": self.layers,
            "heads": 4,
            "length": LENGTH,
            "vocabulary": 256,
        }


CASES = (
    Case("long steps", 128, 4, 16, 25, 3, Bound(">=", 0.95)),
    Case("short steps", 32, 1, 4, 300, 3),
)


def rates(rounds: list[Round]) -> list[float]:
    """Samples/s of each round but the first, in which memory is new."""
    return [one.samples / (one.ended - one.began) for one in rounds[1:]]


async def through_hypha(rig: Rig, case: Case) -> tuple[list[float], int]:
    """A job on one worker: its rounds' rates, and how many threads torch had."""
    model = {"entrypoint": "bench.models:transformer", "arguments": case.arguments}
    rounds = {
        "update_rounds": case.rounds,
        "inner_steps": case.inner_steps,
        "batch_size": case.batch_size,
    }
    course: Course = await rig.run(model, rounds, 1)
    (worker,) = course.workers.values()
    (threads,) = {part.threads for entry in course.ledger.rounds for part in entry.contributors}
    return rates(worker), threads


async def alone(root: Path, case: Case, threads: int, turn: int) -> list[float]:
    """The same loop in a process of its own, in which the executors' environment has no part."""
    directory = root / f"alone-{case.name.replace(' ', '-')}-{turn}"
    directory.mkdir()
    told = {
        "data": str(root / "raw" / "tokens.npy"),
        "model": case.arguments,
        "batch_size": case.batch_size,
        "batches": case.inner_steps * case.rounds,
        "threads": threads,
    }
    environment = {**os.environ, TIMES: str(directory), "OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = [sys.executable, "-m", "bench.plain_loop", json.dumps(told)]
    await trio.run_process(command, cwd=directory, env=environment)
    events = read_times(directory / directory.name)
    sizes = [(case.inner_steps, case.inner_steps * case.batch_size)] * case.rounds
    return rates(cut(events, sizes))


async def measure(directory: Path, case: Case, report: Report) -> None:
    """Both, in turns."""
    tokens = np.random.default_rng(0).integers(0, 256, (SAMPLES, LENGTH)).astype(np.uint8)
    ours: list[float] = []
    plain: list[float] = []
    async with open_rig(directory, 1, {"tokens": tokens}) as rig:
        for turn in range(BLOCKS):
            rated, threads = await through_hypha(rig, case)
            ours += rated
            plain += await alone(directory, case, threads, turn)
    step_ms = 1000 * case.batch_size / statistics.median(plain)
    report.add(
        Row(
            name=f"{case.name}, {step_ms:.1f} ms",
            value=statistics.median(ours),
            unit="samples/s",
            reference=statistics.median(plain),
            bound=case.bound,
            note=f"medians of {len(ours)} and {len(plain)} rounds, {threads} thread(s) each",
        )
    )


def main() -> int:
    """Measure; returns the exit code."""
    report = Report("training")
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
            trio.run(measure, Path(name), case, report)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())

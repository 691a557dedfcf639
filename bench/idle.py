"""How long workers of very different speeds wait for each other: the idle share of each of four, at speeds of
1 : 2 : 4 : 10, in rounds of 5 s and of 60 s.

They are slowed down for real: a batch takes as long as its worker is to need for it, and longer where the
machine is busy. Idle is what is between a round's last batch and the first of the next round:
synchronisation, and waiting for the others.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import trio

from bench.jobs import Rig, open_rig
from bench.report import Bound, Report, Row

SPEEDS = (1, 2, 4, 10)
#: seconds a batch of the slowest
SLOWEST_S = 0.5
BATCH_SIZE = 8
LENGTH = 16
#: many slices: the slowest holds one for minutes
SAMPLES = 131072
MODEL = {"width": 16, "layers": 1, "heads": 1, "length": LENGTH, "vocabulary": 256}
#: length of rounds in seconds, and how many there are; in the first ones speeds are learnt
CASES = ((5.0, 12), (60.0, 5))
LEARNING = 2


async def idle_shares(rig: Rig, round_s: float, rounds: int) -> tuple[dict[int, float], float]:
    """By speed, the share of its time that a worker idles; and how long rounds were."""
    samples = round(sum(speed / SLOWEST_S for speed in SPEEDS) * BATCH_SIZE * round_s)
    course = await rig.run(
        {"entrypoint": "bench.models:transformer", "arguments": MODEL},
        {"update_rounds": rounds, "avg_samples_between_updates": samples, "batch_size": BATCH_SIZE},
        len(SPEEDS),
        within_s=120.0 + 2.0 * round_s * rounds,
    )
    shares: dict[int, float] = {}
    lengths = []
    for own in course.workers.values():
        counted = own[LEARNING:]
        wall_s = counted[-1].began - counted[0].began
        lengths.append(wall_s / (len(counted) - 1))
        pace = statistics.fmean(one.batches for one in counted) / lengths[-1]
        # on a busy machine they are all slower than they should be, and none is twice as slow
        speed = min(set(SPEEDS) - set(shares), key=lambda one: abs(math.log(one / SLOWEST_S / pace)))
        step_s = SLOWEST_S / speed
        ends = [max(one.ended, one.last_began + step_s) for one in counted]
        idle_s = sum(after.began - end for end, after in zip(ends, counted[1:], strict=False))
        shares[speed] = idle_s / wall_s
    return shares, statistics.fmean(lengths)


async def measure() -> Report:
    """Of all cases, on one network."""
    report = Report("idle")
    tokens = np.random.default_rng(0).integers(0, 256, (SAMPLES, LENGTH)).astype(np.uint8)
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as directory:
        steps_s = [SLOWEST_S / speed for speed in SPEEDS]
        async with open_rig(Path(directory), len(SPEEDS), {"tokens": tokens}, steps_s) as rig:
            for round_s, rounds in CASES:
                shares, length_s = await idle_shares(rig, round_s, rounds)
                for speed, share in sorted(shares.items()):
                    name = f"rounds of {round_s:g} s, speed {speed}"
                    note = f"rounds took {length_s:.2f} s"
                    report.add(Row(name, share, "of its time", bound=Bound("<", 0.05), note=note))
    return report


def main() -> int:
    """Run it; 1 when somebody idles for a twentieth of its time."""
    if (os.cpu_count() or 1) < 2:
        print("four trainers, a parameter server and the network need two cores", file=sys.stderr)
        return 1
    return trio.run(measure).finish()


if __name__ == "__main__":
    sys.exit(main())

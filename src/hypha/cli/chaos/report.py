"""What came of it: a row for each fault, goodput, whether the job survived; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from hypha.cli.chaos.goodput import Applied, Stretch, costs_s, gaps, goodput, recovery_s


@dataclass(frozen=True)
class Struck:
    """A fault that was injected: when by the clock, and in the disturbed stretch."""

    struck: float
    at_s: float
    role: str
    how: str
    node: str
    round: int


@dataclass(frozen=True)
class Ended:
    """A process that ended without having been killed, and the end of its log."""

    name: str
    code: int
    tail: str


@dataclass(frozen=True)
class Row:
    """A fault and what it did: ``recovery_s`` until the next round was applied, ``cost_s`` seconds of
    undisturbed training lost until the next fault.
    """

    at_s: float
    role: str
    how: str
    node: str
    round: int
    recovery_s: float | None
    cost_s: float


@dataclass(frozen=True)
class Report:
    """Rates are in samples a second; ``failure`` says why the job did not survive, empty when it did."""

    rows: tuple[Row, ...]
    undisturbed: tuple[float, ...]
    disturbed: float
    seconds: float
    rounds: int
    generation: int
    ended: tuple[Ended, ...]
    failure: str

    @property
    def goodput(self) -> float:
        """Of the disturbed stretch over that of the faster of the calm ones."""
        calm = max(self.undisturbed, default=0.0)
        return self.disturbed / calm if calm else 0.0

    def to_json(self) -> dict[str, Any]:
        """Of plain values."""
        return {"goodput": self.goodput, "survived": not self.failure, **asdict(self)}


def judge(
    stretches: Sequence[Stretch],
    applied: Sequence[Applied],
    samples: Mapping[int, int],
    struck: Sequence[Struck],
    ended: Sequence[Ended],
    generation: int,
    failure: str,
) -> Report:
    """``stretches`` are calm, disturbed, calm; fewer when the job got stuck in one."""
    disturbed = [goodput(one, samples) for one in stretches[1:2]]
    calm = [goodput(one, samples) for one in (*stretches[:1], *stretches[2:])]
    stop = stretches[-1].stop if stretches else 0
    missing = gaps(samples, stop)
    if missing and not failure:
        failure = f"rounds {missing[:10]} are missing in the ledger"
    end = stretches[1].ended if len(stretches) > 1 else (applied[-1].at if applied else 0.0)
    times = [one.struck for one in struck]
    costs = costs_s(times, end, applied, samples, max(calm)) if calm and max(calm) > 0 else [0.0] * len(times)
    rows = [
        Row(one.at_s, one.role, one.how, one.node, one.round, recovery_s(one.struck, applied), cost)
        for one, cost in zip(struck, costs, strict=True)
    ]
    return Report(
        tuple(rows),
        tuple(calm),
        disturbed[0] if disturbed else 0.0,
        stretches[1].wall_s if len(stretches) > 1 else 0.0,
        stop,
        generation,
        tuple(ended),
        failure,
    )


def show(console: Console, report: Report) -> None:
    """The table of faults, then what it comes to."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("time", "role", "how", "node", "round", "next round after", "cost"):
        table.add_column(name, justify="left" if name in ("role", "how", "node") else "right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            f"{row.at_s:.1f} s",
            row.role,
            row.how,
            row.node,
            str(row.round),
            "never" if row.recovery_s is None else f"{row.recovery_s:.1f} s",
            f"{row.cost_s:.1f} s",
        )
    console.print(table)
    for one in report.ended:
        console.print(
            f"{one.name} ended by itself with exit code {one.code}:\n{one.tail}",
            markup=False,
            highlight=False,
        )
    calm = " and ".join(f"{rate:.0f}" for rate in report.undisturbed) or "-"
    lines = (
        f"Undisturbed: {calm} samples/s, before and after.",
        f"Disturbed:   {report.disturbed:.0f} samples/s, {len(report.rows)} faults in {report.seconds:.0f} s",
        f"Goodput:     {report.goodput:.1%}",
        f"The job has applied {report.rounds} rounds without a gap, in generation {report.generation}."
        if not report.failure
        else "The job did not survive.",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

"""What came of it: a row for each fault, goodput, whether the job survived; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from hypha.cli.chaos.measuring import (
    TOLERANCE,
    Account,
    Applied,
    RoundSpan,
    costs_s,
    gaps,
    goodput,
    recovery_s,
)
from hypha.cli.printing import add_row, print_line, table_of


@dataclass(frozen=True)
class InjectedFault:
    """A fault that was injected: when by the clock, and in the disturbed stretch. In a report, ``recovery_s``
    is until the next applied round, and ``cost_s`` of calm training were lost until the next fault.
    """

    struck: float
    at_s: float
    role: str
    how: str
    node: str
    round: int
    recovery_s: float | None = None
    cost_s: float = 0.0


@dataclass(frozen=True)
class UnexpectedEnd:
    """A process that ended without having been killed, and the end of its log."""

    name: str
    code: int
    tail: str


@dataclass(frozen=True)
class ChaosReport:
    """What was seen of a run, and what follows; rates are in samples a second. ``stretches`` are calm,
    disturbed, calm; fewer when the job got stuck in one, and ``stuck`` says how. ``samples`` are those of the
    rounds that count, by round. ``own`` is the disturbed stretch by the scheduler's own account, where there
    is one.
    """

    stretches: Sequence[RoundSpan]
    applied: Sequence[Applied]
    samples: Mapping[int, int]
    struck: Sequence[InjectedFault] = ()
    ended: Sequence[UnexpectedEnd] = ()
    generation: int = 0
    stuck: str = ""
    own: Account | None = None

    @property
    def undisturbed(self) -> tuple[float, ...]:
        """The rates of the calm stretches."""
        return tuple(goodput(one, self.samples) for one in (*self.stretches[:1], *self.stretches[2:]))

    @property
    def disturbed(self) -> float:
        return sum(goodput(one, self.samples) for one in self.stretches[1:2])

    @property
    def seconds(self) -> float:
        """How long the disturbed stretch lasted."""
        return sum(one.wall_s for one in self.stretches[1:2])

    @property
    def rounds(self) -> int:
        return self.stretches[-1].stop if self.stretches else 0

    @property
    def failure(self) -> str:
        """Why the job did not survive, empty when it did."""
        missing = gaps(self.samples, self.rounds)
        return self.stuck or (f"rounds {missing[:10]} are missing in the ledger" if missing else "")

    @property
    def rows(self) -> list[InjectedFault]:
        """The faults, with what each cost."""
        ends = [one.ended for one in self.stretches[1:2]] or [one.at for one in self.applied[-1:]] or [0.0]
        times, calm = [one.struck for one in self.struck], max(self.undisturbed, default=0.0)
        costs = [0.0] * len(times)
        if calm > 0:
            costs = costs_s(times, ends[0], self.applied, self.samples, calm)
        return [
            replace(one, recovery_s=recovery_s(one.struck, self.applied), cost_s=cost)
            for one, cost in zip(self.struck, costs, strict=True)
        ]

    @property
    def goodput(self) -> float:
        """Of the disturbed stretch over that of the faster of the calm ones."""
        calm = max(self.undisturbed, default=0.0)
        return self.disturbed / calm if calm else 0.0

    @property
    def badput_s(self) -> dict[str, float]:
        """Worker seconds by reason, as the scheduler says; ``unseen`` while there was none to count."""
        if self.own is None:
            return {}
        unseen_s = self.own.places * (self.own.wall_s - self.own.seen_s)
        return {**self.own.badput_s, "unseen": unseen_s}

    @property
    def difference(self) -> float | None:
        """Of the scheduler's own rate from what was measured here, as a share; None where one is missing."""
        if self.own is None or not self.disturbed:
            return None
        return self.own.samples_per_s / self.disturbed - 1.0

    @property
    def agrees(self) -> bool:
        """Is the scheduler's own account right, within a hundredth?"""
        difference = self.difference
        return self.own is not None and self.own.adds_up and abs(difference or 0.0) <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        names = ("goodput", "badput_s", "difference", "agrees", "undisturbed", "disturbed", "seconds")
        return {
            "survived": not self.failure,
            **{name: getattr(self, name) for name in (*names, "rounds", "generation", "failure")},
            "rows": [asdict(one) for one in self.rows],
            "ended": [asdict(one) for one in self.ended],
            "own": None if self.own is None else asdict(self.own),
        }


def show(console: Console, report: ChaosReport) -> None:
    rows = report.rows
    table = table_of("role", "how", "node", right=("time", "round", "next round after", "cost"))
    for row in rows:
        recovery = "never" if row.recovery_s is None else f"{row.recovery_s:.1f} s"
        at, cost = f"{row.at_s:.1f} s", f"{row.cost_s:.1f} s"
        add_row(table, row.role, row.how, row.node, at, str(row.round), recovery, cost)
    console.print(table)
    for one in report.ended:
        print_line(console, f"{one.name} ended by itself with exit code {one.code}:\n{one.tail}")
    calm = " and ".join(f"{rate:.0f}" for rate in report.undisturbed) or "-"
    lines = (
        f"Undisturbed: {calm} samples/s, before and after.",
        f"Disturbed:   {report.disturbed:.0f} samples/s, {len(rows)} faults in {report.seconds:.0f} s",
        f"Goodput:     {report.goodput:.1%}",
        f"The job has applied {report.rounds} rounds without a gap, in generation {report.generation}."
        if not report.failure
        else "The job did not survive.",
    )
    for line in (*lines, *_own_lines(report)):
        print_line(console, line)


def _own_lines(report: ChaosReport) -> list[str]:
    """What the scheduler reports of the disturbed stretch, and whether that is right."""
    own = report.own
    if own is None:
        return ["The scheduler's own account of the disturbed stretch could not be read."]
    total_s = own.places * own.wall_s
    parts = {"goodput": own.goodput_s, **report.badput_s}
    shares = ", ".join(
        f"{name} {seconds / total_s:.1%}"
        for name, seconds in sorted(parts.items(), key=lambda item: -item[1])
        if abs(seconds) >= 0.0005 * total_s > 0
    )
    lines = [
        f"The scheduler's own account: {own.samples_per_s:.0f} samples/s, "
        f"{report.difference or 0.0:+.2%} from what was measured.",
        f"Of {own.places} places x {own.wall_s:.0f} s: {shares}.",
    ]
    if not own.adds_up:
        lines.append("THE SCHEDULER'S ACCOUNT DOES NOT ADD UP to the wall clock.")
    if abs(report.difference or 0.0) > TOLERANCE:
        lines.append(f"THE SCHEDULER'S ACCOUNT IS WRONG by more than {TOLERANCE:.0%}.")
    return lines

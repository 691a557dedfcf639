"""Ten minutes of kills, freezes and cuts of every role, one every 20 seconds: what is left of the goodput.

``hypha chaos`` with its defaults. Cuts need root. The table of faults has the time until the next round was
applied, and what each cost in seconds of undisturbed training. Only run when it is named.
"""

from __future__ import annotations

import sys

from bench.report import Bound, Report, Row
from hypha.cli.chaos.report import ChaosReport as Outcome
from hypha.cli.chaos.run import ChaosOptions, run_chaos
from hypha.cli.running import run_until_signal

MINUTES = 10
WORKERS = 4
INTERVAL_S = 20.0
SEED = 0
GOODPUT = 0.9


def told(outcome: Outcome) -> Report:
    """The outcome as a benchmark's report."""
    report = Report("chaos")
    report.add(
        Row(
            "goodput, disturbed against undisturbed",
            outcome.disturbed,
            "samples/s",
            reference=max(outcome.undisturbed, default=0.0) or None,
            bound=Bound(">=", GOODPUT),
            note=f"undisturbed {' and '.join(f'{rate:.0f}' for rate in outcome.undisturbed)}",
        )
    )
    survived = float(not outcome.failure)
    report.add(Row("the job survived", survived, "", bound=Bound(">=", 1), note=outcome.failure[:60]))
    report.add(Row("processes that ended by themselves", len(outcome.ended), "", bound=Bound("<=", 0)))
    for row in outcome.rows:
        report.add(
            Row(
                f"{row.at_s:5.0f} s, round {row.round}: {row.how} {row.role}",
                -1.0 if row.recovery_s is None else row.recovery_s,
                "s",
                note="never recovered" if row.recovery_s is None else f"cost {row.cost_s:.1f} s",
            )
        )
    return report


def main() -> int:
    """Run it and tell."""
    outcomes: list[Outcome] = []

    async def service() -> None:
        options = ChaosOptions(MINUTES * 60, WORKERS, INTERVAL_S, SEED, ("kill", "stop", "cut"), None, None)
        outcomes.append(await run_chaos(options))

    code = run_until_signal(service, stop_s=None, hangup=True)
    return told(outcomes[0]).finish() if outcomes else code


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks that users are promised are there, and a missed bound is an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import __main__ as command
from bench import report
from bench.report import Bound, Report, Row


def test_every_benchmark_is_found() -> None:
    assert command.names() == [
        "bulk",
        "chaos",
        "leases",
        "memory",
        "outer_sync",
        "telemetry",
        "training",
        "warm",
    ]
    assert command.run(["nothing"]) == 2


@pytest.mark.parametrize(("value", "missed"), [(95.0, 0), (94.0, 1)])
def test_a_bound_is_on_the_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, missed: int
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    made = Report("some")
    made.add(Row("only told", 1.0, "s"))
    made.add(Row("bounded", value, "samples/s", reference=100.0, bound=Bound(">=", 0.95)))
    assert made.finish() == missed
    assert f'"verdict": "{"missed" if missed else "ok"}"' in (tmp_path / "some.json").read_text()

"""The benchmarks that users are promised are there, and a missed bound is an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import __main__ as command
from bench import bulk, outer_defaults, outer_tasks, report
from bench.report import Bound, Report, Row

from hypha.access import KINDS, may_act_as


def test_every_benchmark_is_found() -> None:
    assert command.names() == [
        "bulk",
        "chaos",
        "leases",
        "memory",
        "outer_defaults",
        "outer_sync",
        "telemetry",
        "training",
        "warm",
    ]
    assert command.run(["nothing"]) == 2


def test_what_the_bulk_benchmark_sends_may_be_sent() -> None:
    """It once sent files of a kind of its own, which nobody takes any more."""
    assert may_act_as(frozenset({bulk.SENDER}), KINDS[bulk.KIND].senders)
    assert may_act_as(frozenset({bulk.RECEIVER}), KINDS[bulk.KIND].receivers)


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


def test_the_outer_step_of_the_study_is_the_products() -> None:
    for setting in outer_defaults.GRID:
        outer_defaults.check_outer_step(setting)


def test_models_that_are_trained_together_are_trained_as_if_alone() -> None:
    """Settings, seeds and workers are slices of the same tensors: none may see another's."""
    task = outer_tasks.photographs()
    some, other = outer_defaults.Setting(1.0, 0.0), outer_defaults.Setting(0.7, 0.9)
    together = outer_defaults.diloco(task, 2, [some, other], 3, 2, seeds=(0, 1))
    alone = outer_defaults.diloco(task, 2, [other], 3, 2, seeds=(1,))
    assert together[1][1] == pytest.approx(alone[0][0], rel=1e-4)
    assert len({round(loss, 3) for losses in together for loss in losses}) == 4
    begun = outer_tasks.held_out_losses(
        task, task.build(), {name: one[None] for name, one in outer_tasks.initial(task, 0).items()}
    )
    assert together[0][0] < float(begun[0])


def test_with_one_worker_and_a_plain_outer_step_it_is_one_process() -> None:
    task = outer_tasks.photographs()
    plain = outer_defaults.Setting(1.0, 0.0)
    ((steps, expected),) = outer_defaults.one_process(task, [6], seeds=(0,))
    assert steps == 6
    assert outer_defaults.diloco(task, 1, [plain], 3, 2, seeds=(0,))[0] == pytest.approx(expected, rel=1e-4)


def test_the_studys_table_is_put_into_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{outer_defaults.BEGIN}\nold\n{outer_defaults.END}\n\nafter\n")
    cell = outer_defaults.Cell("text", 8, 2, 2.0, 1.0, outer_defaults.Setting(1.0, 0.3), 1.02, 0.5)
    outer_defaults.write_page([cell], page)
    before, table, after = page.read_text().split("\n\n")
    assert (before, after) == ("before", "after\n")
    assert "old" not in table
    assert "| text | 8 | 2 | 2.000 | 1.000 (1 / 0.3) | 1.020 (1 / 0.6) | 1.020 | 0.500 |" in table

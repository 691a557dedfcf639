"""``hypha timeline``: the shape of a Chrome trace, which Perfetto is strict about."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tests.cli.test_status import hypha
from tests.scheduler.test_history import ledger, watched
from tests.scheduler.test_ledger import entry

from hypha.cli.job.timeline import TraceEvent, trace_events
from hypha.scheduler.status.round_record import Fault, RoundRecord, Span, WorkerRound

WALL = 1_700_000_000.0


def checked(events: list[TraceEvent]) -> list[TraceEvent]:
    """As the format wants it; without the events that only name things."""
    names = {(event.pid, event.tid) for event in events if event.name == "thread_name"}
    processes = {event.pid for event in events if event.name == "process_name"}
    shown = [event for event in events if event.ph != "M"]
    for event in events:
        assert event.ph in ("X", "i", "M")
        assert event.name
        assert event.ts >= 0
        assert event.pid in processes
        assert event.ph == "M" or (event.pid, event.tid) in names
        assert isinstance(event.dur, int) == (event.ph == "X")
        assert (event.s == "p") == (event.ph == "i")
    assert all(isinstance(event.dur, int) and event.dur >= 0 for event in shown if event.ph == "X")
    assert [event.ts for event in shown] == sorted(event.ts for event in shown)
    # spans of one track lie beside each other or within each other
    spans = sorted(
        (event.pid, event.tid, event.ts, event.ts + event.dur)
        for event in shown
        if isinstance(event.dur, int)
    )
    for _, group in itertools.groupby(spans, key=lambda span: span[:2]):
        for (*_, begin, end), (*_, next_begin, next_end) in itertools.pairwise(group):
            assert next_begin >= end or (begin <= next_begin and next_end <= end)
    return shown


def test_a_whole_job_is_a_proper_trace() -> None:
    world, history = watched(samples=2000)
    world.run(60, until=lambda: world.machine.round == 1 and world.workers["a"].batches > 3)
    world.kill("b")
    world.run()
    # the world's clock stands still for the wall: rounds are laid one after the other
    at, records = WALL, []
    for record in history.records:
        records.append(
            RoundRecord(**{name: getattr(record, name) for name in record.__struct_fields__} | {"began": at})
        )
        at += record.length_s
    shown = checked(trace_events(records))
    assert [event.name for event in shown if event.name.startswith("round ")] == [
        f"round {n}" for n in range(1, 6)
    ]
    names = {event.name for event in shown}
    assert {"training", "sending", "waiting", "outer-step", "loading"} <= names
    faults = [event for event in shown if event.ph == "i"]
    assert [(event.name, event.args["text"]) for event in faults] == [("lost", "its lease ended")]


def test_clocks_that_disagree_make_no_overlaps() -> None:
    spans = (Span("training", 0.0, 0.9), Span("sending", 0.9, 1.1))
    worker = WorkerRound("w" * 12, spans=spans, counted=True)
    fault = Fault(5.0, "w" * 12, "lost", "late")
    records = [
        RoundRecord("job", 0, number, WALL + number, 1.0002, workers=(worker,), faults=(fault,))
        for number in range(3)
    ]
    shown = checked(trace_events(records))
    assert max(event.ts for event in shown if event.ph == "i") <= 3.1e6
    assert trace_events([]) == []


async def test_it_is_written_from_a_state_directory(tmp_path: Path) -> None:
    state = tmp_path / "state" / "digits"
    state.mkdir(parents=True)
    ledger(state, entry(0), entry(1))
    for job in ([str(state)], ["digits", "--state-dir", str(tmp_path / "state")]):
        output = tmp_path / "rounds.json"
        output.unlink(missing_ok=True)
        done = await hypha("timeline", *job, "-o", str(output))
        assert done.returncode == 0, done.stderr
        trace = json.loads(output.read_text())
        assert {"round 1", "round 2"} <= {event["name"] for event in trace["traceEvents"]}
        for event in trace["traceEvents"]:
            assert {"ph", "ts", "pid", "tid", "name"} <= event.keys()
            assert ("dur" in event) == (event["ph"] == "X")


@pytest.mark.parametrize("job", ["nothing", "."])
async def test_where_there_is_no_job_that_is_said(job: str, tmp_path: Path) -> None:
    refused = await hypha("timeline", job, "--state-dir", str(tmp_path))
    assert refused.returncode == 1
    assert "there is no ledger" in refused.stderr.decode()

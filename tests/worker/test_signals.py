"""What a worker shows of its executors (spans of their lives, samples, durations), and takes of theirs."""

from __future__ import annotations

import json
import logging

import msgspec
import pytest
import trio
from tests.support.signals import Signals
from tests.worker.test_process import train_job
from trio.testing import MockClock

from hypha.decoding import decode_json
from hypha.errors import Refused, Undecodable
from hypha.messages import (
    MAX_SPANS_A_CALL,
    CloseRound,
    Contribution,
    FinishedSpan,
    JobStamp,
    Loaded,
    Progress,
    RoundApplied,
    RoundStarted,
    SpanEvent,
    SpansCall,
    Traced,
    UpdateSent,
    encode_json,
)
from hypha.telemetry import instruments as metrics
from hypha.tracing import round_traceparent
from hypha.worker.bridge.spans import SPANS_A_WINDOW, WINDOW_S, ExecutorSpans
from hypha.worker.jobs.execution_signals import ExecutionSignals

DISPATCH = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
JOB = msgspec.structs.replace(train_job(), traced=Traced(traceparent=DISPATCH, ratio=1.0))


def progress(round_: int, samples: int, attempt: int = 0) -> Progress:
    return Progress(round=round_, batches=samples, samples=samples, busy_s=0.1, loss=1.0, attempt=attempt)


async def test_samples_are_counted_once_and_never_taken_back(signals: Signals) -> None:
    shown = ExecutionSignals(JOB, "L", emits=False)
    expected = 0
    for report, new in [
        (progress(0, 8), 8),
        (progress(0, 8), 0),
        (progress(0, 24), 16),
        (progress(1, 8), 8),
        # the round begins anew: the samples were trained on, whether they count or not
        (progress(1, 4, attempt=1), 4),
        (progress(1, 12, attempt=1), 8),
        # an earlier checkpoint: rounds come again
        (progress(0, 16), 16),
        (progress(0, 2), 2),
        (progress(0, -5), 0),
    ]:
        shown.reported(report)
        expected += new
        assert signals.reading(metrics.TRAINING_SAMPLES) == expected
    # another executor counts from nothing
    ExecutionSignals(JOB, "L", emits=False).reported(progress(0, 3))
    assert signals.reading(metrics.TRAINING_SAMPLES) == expected + 3


async def test_an_executors_life_is_a_span_below_its_dispatch(
    signals: Signals, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="hypha.worker")
    shown = ExecutionSignals(JOB, "L", emits=True)
    traced = shown.begin()
    assert traced is not None
    stamp = JobStamp(job_id=JOB.job_id, generation=1, round=3)
    assert shown.trace_of(stamp) == DISPATCH, "no theta has come yet"
    await trio.sleep(2.5)
    shown.reported(Loaded(incarnation="i"))
    shown.theta_arrived(3, 1000)
    assert shown.trace_of(stamp) == round_traceparent(JOB.job_id, 1, 3, 1.0)
    assert shown.round == 3
    shown.reported(RoundStarted(round=3, theta="t"))
    await trio.sleep(4)
    part = Contribution(
        round=3, worker=JOB.me, incarnation="i", samples=40, batches=10, batch_size=4, steps=0, ranges=()
    )
    shown.reported(UpdateSent(contribution=part))
    shown.end(1, stopped=False)
    shown.close()
    (span,) = signals.spans("Execute job")
    assert span.context is not None
    assert span.parent is not None
    assert traced == Traced(
        traceparent=f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01", ratio=1.0
    )
    assert f"00-{span.parent.trace_id:032x}-{span.parent.span_id:016x}-01" == DISPATCH
    assert (span.attributes or {})["process.exit.code"] == 1
    assert not span.status.is_ok
    assert signals.reading(metrics.EXECUTION_DURATION, kind="train", status="failure") == 1
    assert signals.reading(metrics.EXECUTOR_LOADING, kind="train") == 1
    said = " ".join(record.getMessage() for record in caplog.records)
    for words in (
        "Theta of round 3 was received: 1000 bytes",
        "RoundStarted(round=3",
        "samples=40, batches=10",
    ):
        assert words in said


async def test_an_outer_step_is_timed_once(signals: Signals, autojump_clock: MockClock) -> None:
    shown = ExecutionSignals(JOB, "L", emits=False)
    applied = RoundApplied(round=0, theta="t1", contributors=("a",))
    shown.steered(CloseRound(round=0))
    await trio.sleep(0.3)
    shown.steered(CloseRound(round=0))
    await trio.sleep(0.4)
    shown.reported(applied)
    # it is said again in another life of the job
    shown.reported(applied)
    assert signals.reading(metrics.OUTER_STEP_DURATION) == 1
    assert shown.round == 1


@pytest.mark.parametrize("emits", [False, True])
async def test_an_executor_whose_spans_nobody_exports_is_not_asked_for_any(emits: bool) -> None:
    shown = ExecutionSignals(JOB, "L", emits)
    assert (shown.begin() is not None) == emits
    untold = ExecutionSignals(train_job(), "L", emits=True)
    assert untold.begin() is None, "the scheduler does not trace"
    assert untold.trace_of(JobStamp(job_id="j")) is None


# --- what an executor hands over ------------------------------------------------------------------------


def finished(**changes: object) -> FinishedSpan:
    values: dict[str, object] = {
        "name": "Train", "trace_id": "a" * 32, "span_id": "b" * 16, "start_ns": 1, "end_ns": 2,
        "parent_id": "c" * 16, **changes,
    }  # fmt: skip
    return FinishedSpan(**values)  # type: ignore[arg-type]


async def test_spans_are_exported_as_of_their_job() -> None:
    emitted: list[FinishedSpan] = []
    spans = ExecutorSpans(emitted.extend, "job-1")
    spans.take([finished(attributes={"hypha.round": 2, "hypha.job": "another"})])
    assert emitted == [finished(attributes={"hypha.round": 2, "hypha.job": "job-1"})]


@pytest.mark.parametrize(
    "changes",
    [
        {"trace_id": "a" * 31},
        {"trace_id": "0" * 32},
        {"span_id": "B" * 16},
        {"span_id": "x" * 16},
        {"parent_id": ""},
        {"name": ""},
        {"name": "x" * 200},
        {"error": "x" * 2000},
        {"end_ns": 0},
        {"end_ns": 1 << 70},
        {"start_ns": -1},
        {"links": ("x",) * 33},
        {"links": ("x" * 200,)},
        {"events": (SpanEvent(name="e", time_ns=1),) * 129},
        {"events": (SpanEvent(name="e", time_ns=1 << 70),)},
        {"attributes": {str(number): 1 for number in range(33)}},
        {"attributes": {"x" * 200: 1}},
        {"attributes": {"x": "y" * 2000}},
        {"attributes": {"x": 1 << 70}},
    ],
    ids=str,
)
async def test_spans_that_make_no_sense_are_refused_with_all_of_their_call(
    changes: dict[str, object],
) -> None:
    emitted: list[FinishedSpan] = []
    spans = ExecutorSpans(emitted.extend, "job-1")
    call = json.dumps({"spans": [msgspec.to_builtins(one) for one in (finished(), finished(**changes))]})
    with pytest.raises((Undecodable, Refused)):
        spans.take(decode_json(call, SpansCall).spans)
    assert not emitted


async def test_too_many_spans_are_refused(autojump_clock: MockClock) -> None:
    emitted: list[FinishedSpan] = []
    spans = ExecutorSpans(emitted.extend, "job-1")
    call = encode_json(SpansCall(spans=(finished(),) * (MAX_SPANS_A_CALL + 1)))
    with pytest.raises(Undecodable, match=f"length <= {MAX_SPANS_A_CALL}"):
        decode_json(call, SpansCall)
    for _ in range(SPANS_A_WINDOW // 100):
        spans.take([finished()] * 100)
    with pytest.raises(Refused, match="busy"):
        spans.take([finished()])
    assert len(emitted) == SPANS_A_WINDOW
    await trio.sleep(WINDOW_S)
    spans.take([finished()])
    with pytest.raises(Refused, match="unsupported"):
        ExecutorSpans(None, "job-1").take([finished()])


async def test_spans_are_bounded_in_size_and_keep_no_secret() -> None:
    emitted: list[FinishedSpan] = []
    spans = ExecutorSpans(emitted.extend, "job-1", ("hf_sesame", ""))
    told = {"url": "https://hub/x?token=hf_sesame"}
    event = SpanEvent(name="failed", time_ns=1, attributes=told)
    spans.take([finished(error="401 for hf_sesame", attributes=told, events=(event,))])
    assert "hf_sesame" not in repr(emitted)
    assert "***" in emitted[0].error
    attributes = {f"{number}": "x" * 1000 for number in range(8)}
    event = SpanEvent(name="e", time_ns=1, attributes=attributes)
    large = finished(events=(event,) * 100)
    before = len(emitted)
    for _ in range(4):
        spans.take([large])
    with pytest.raises(Refused, match="bytes"):
        spans.take([large])
    assert len(emitted) - before == 4

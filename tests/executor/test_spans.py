"""An executor's own recorder: what it records, what it hands over, and that it is in nobody's way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence

import pytest
from opentelemetry import trace
from opentelemetry.trace import Span
from tests.support.stopwatch import Stopwatch

from hypha.errors import PeerUnreachable, Refused
from hypha.executor.bridge.spans import MAX_EVENTS, MAX_TEXT, MAX_WAITING, SpanRecorder
from hypha.messages import MAX_SPANS_A_CALL, FinishedSpan
from hypha.tracing import event, span, start_span, trace_context, traceparent
from hypha.tracing.operations import SEND_UPDATE, TRAIN

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = PARENT[:-1] + "0"


class Worker:
    """The other end: takes spans, or not."""

    def __init__(self) -> None:
        self.batches: list[Sequence[FinishedSpan]] = []
        self.refusals: list[Exception] = []
        self.open = threading.Event()
        self.open.set()

    def post(self, spans: Sequence[FinishedSpan]) -> None:
        self.open.wait()
        if self.refusals:
            raise self.refusals.pop(0)
        self.batches.append(spans)

    @property
    def spans(self) -> list[FinishedSpan]:
        return [one for batch in self.batches for one in batch]


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def recorder(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> SpanRecorder:
    found = SpanRecorder(worker.post)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: found)
    return found


def test_spans_have_the_right_parents_attributes_and_outcome(recorder: SpanRecorder, worker: Worker) -> None:
    before = time.time_ns()
    with span(TRAIN, {"hypha.round": 3, "hypha.job": "j"}, parent=PARENT) as outer:
        with contextlib.suppress(ValueError), span(SEND_UPDATE):
            inside = traceparent()
            event("overtaken", {"hypha.batches": 2})
            raise ValueError("no number")
        outer.set_attributes({"loss": float("nan"), "long": "x" * 5000, "ratio": 0.5})
        start_span(SEND_UPDATE, links=[PARENT]).end()
    assert recorder.flush(5)
    inner, linked, train = worker.spans
    assert (train.name, train.trace_id, train.parent_id) == ("Train", PARENT[3:35], PARENT[36:52])
    assert train.attributes == {
        "hypha.round": 3, "hypha.job": "j", "loss": "nan", "long": "x" * MAX_TEXT, "ratio": 0.5
    }  # fmt: skip
    assert (inner.trace_id, inner.parent_id) == (train.trace_id, train.span_id)
    assert inside == f"00-{inner.trace_id}-{inner.span_id}-01"
    assert (inner.status, inner.error) == ("error", "ValueError: no number")
    assert train.status == "unset"
    assert linked.links == (PARENT,)
    (happened,) = inner.events
    assert (happened.name, happened.attributes) == ("overtaken", {"hypha.batches": 2})
    assert before <= train.start_ns <= inner.start_ns <= happened.time_ns <= inner.end_ns <= train.end_ns


@pytest.mark.parametrize("parent", [None, UNSAMPLED])
def test_what_nobody_sampled_is_not_recorded(
    recorder: SpanRecorder, worker: Worker, parent: str | None
) -> None:
    with span(TRAIN, parent=parent) as outer, span(SEND_UPDATE):
        assert not outer.is_recording()
        assert traceparent() == parent
    assert recorder.flush(5)
    assert not worker.batches


def ended(count: int) -> None:
    for _ in range(count):
        start_span(TRAIN, parent=PARENT).end()


def test_a_worker_that_does_not_answer_holds_nobody_up_and_costs_no_memory(
    recorder: SpanRecorder, worker: Worker
) -> None:
    worker.open.clear()
    began = Stopwatch()
    ended(3 * MAX_WAITING)
    assert not recorder.flush(0.2)
    assert began.elapsed_s() < 5
    assert recorder.dropped >= 3 * MAX_WAITING - MAX_WAITING - MAX_SPANS_A_CALL
    worker.open.set()
    assert recorder.flush(5)
    while len(worker.spans) < 3 * MAX_WAITING - recorder.dropped:
        # those that were on their way when the worker did not answer
        assert began.elapsed_s() < 10
        time.sleep(0.01)
    assert max(map(len, worker.batches)) <= MAX_SPANS_A_CALL


def test_spans_that_are_refused_are_dropped_and_later_ones_are_not(
    recorder: SpanRecorder, worker: Worker
) -> None:
    worker.refusals = [Refused("busy", "too many"), PeerUnreachable("bridge", "gone")]
    for _ in range(3):
        ended(1)
        assert recorder.flush(5)
    assert (len(worker.spans), recorder.dropped) == (1, 2)


def test_a_worker_that_exports_nothing_is_not_asked_again(recorder: SpanRecorder, worker: Worker) -> None:
    worker.refusals = [Refused("unsupported", "no traces here")]
    ended(1)
    assert recorder.flush(5)
    ended(5)
    assert recorder.flush(5)
    assert (worker.batches, recorder.dropped) == ([], 6)


def test_spans_of_other_threads_and_ends_that_come_twice(recorder: SpanRecorder, worker: Worker) -> None:

    def work() -> None:
        assert traceparent() is None, "a thread is in no span unless it is told"
        with trace_context(PARENT), span(SEND_UPDATE) as found:
            for number in range(2 * MAX_EVENTS):
                found.add_event(str(number))
            found.end()

    threads = [threading.Thread(target=work) for _ in range(8)]
    with span(TRAIN, parent=PARENT):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.flush(5)
    names = [one.name for one in worker.spans]
    assert sorted(names) == ["Send update"] * 8 + ["Train"]
    assert len({one.span_id for one in worker.spans}) == 9
    assert {len(one.events) for one in worker.spans} == {0, MAX_EVENTS}


def test_no_thread_runs_before_there_is_something_to_do(recorder: SpanRecorder) -> None:
    before = threading.active_count()
    assert isinstance(start_span(TRAIN, parent=PARENT), Span)
    assert threading.active_count() == before, "an executor host that has threads cannot fork"

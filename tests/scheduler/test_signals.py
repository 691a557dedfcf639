"""A job's metrics and spans, from what its machines note: real machines, numbers for a clock."""

from __future__ import annotations

from random import Random
from typing import cast

import msgspec
import pytest
from tests.scheduler.test_allocator import SERVER, TRAIN, offer
from tests.scheduler.test_rounds import rules
from tests.scheduler.world import Worker, World
from tests.support.signals import Signals

from hypha.journal import Journal
from hypha.messages import JobStamp, Resources
from hypha.node import Node
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import Adopted, Gained, LeaseFailed, Offered, Want
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.leasing.renewal import Renewal, RenewalFailed, RenewalRefused, Renewed
from hypha.scheduler.rounds.events import ParticipantLost as ServerLost
from hypha.scheduler.rounds.events import Publish
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.scheduler.status.signals import JobMetrics
from hypha.scheduler.status.snapshot import JobSnapshot, Progressed
from hypha.telemetry import instruments as metrics
from hypha.telemetry.metrics import Instrument
from hypha.tracing import round_traceparent


def metrics_of(journal: Journal, world: World | None = None) -> JobMetrics:
    """Those of a job whose machines note in ``journal``."""
    # a pool that does not run asks nothing of its node
    pool = Pool(cast(Node, object()), [TRAIN, SERVER])
    found = JobMetrics(
        pool, Progressed(), 5, 0.0, lambda: world.machine if world is not None else None, lambda: None
    )
    for entry in journal.entries:
        found.note(entry)
    journal.listeners.append(found.note)
    return found


def by_label(signals: Signals, instrument: Instrument, label: str) -> dict[str, float]:
    """Values of ``instrument``, which has that label alone."""
    return {dict(labels)[label]: value for labels, value in signals.readings(instrument).items()}


def outcomes(signals: Signals, kind: str = "train") -> dict[str, float]:
    found = {
        (dict(labels)["kind"], dict(labels)["outcome"]): value
        for labels, value in signals.readings(metrics.OFFERS_RECEIVED).items()
    }
    return {outcome: value for (of, outcome), value in found.items() if of == kind}


def test_offers_are_counted_by_what_became_of_them(signals: Signals) -> None:
    journal = Journal(checked=True)
    allocator = Allocator([msgspec.structs.replace(TRAIN, needs=("bf16",)), SERVER], journal=journal)
    metrics_of(journal)
    allocator.handle(Want("train", 1), 0.0)
    allocator.handle(Offered("dear", offer("dear", price=9.0)), 0.1)
    allocator.handle(Offered("small", offer("small", resources=Resources(cpu=0.5))), 0.1)
    old = msgspec.structs.replace(offer("old"), version="9.0", features=("fp16",))
    allocator.handle(Offered("old", old), 0.1)
    allocator.handle(Offered("hasty", offer("hasty", expires_in_s=0.0)), 0.1)
    allocator.handle(Offered("stranger", offer("stranger", request_id="of somebody else")), 0.1)
    for name in ("good", "worse"):
        allocator.handle(Offered(name, offer(name, price={"good": 1.0, "worse": 1.5}[name])), 0.2)
    allocator.handle(Tick(), 0.6)
    assert outcomes(signals) == {"price": 1, "resources": 1, "features": 1, "late": 1, "not-needed": 1}
    assert outcomes(signals, "other") == {"other": 1}
    allocator.handle(Gained("lease of good for rt"), 0.7)
    allocator.handle(Offered("idle", offer("idle")), 0.8)
    assert outcomes(signals) == {
        "price": 1,
        "resources": 1,
        "features": 1,
        "late": 1,
        "not-needed": 2,
        "accepted": 1,
    }


def test_an_offer_whose_acceptance_fails_is_lost_and_its_worker_avoided(signals: Signals) -> None:
    journal = Journal(checked=True)
    allocator = Allocator([TRAIN], journal=journal)
    metrics_of(journal)
    allocator.handle(Want("train", 1), 0.0)
    allocator.handle(Offered("W1", offer("W1")), 0.1)
    allocator.handle(Tick(), 0.6)
    allocator.handle(LeaseFailed("lease of W1 for rt"), 0.7)
    assert outcomes(signals) == {"lost": 1}
    # it failed lately, so another one is taken although it offers more for the price
    allocator.handle(Offered("W1", offer("W1", lease_id="again", price=0.1)), 2.0)
    allocator.handle(Offered("W2", offer("W2")), 2.0)
    allocator.handle(Tick(), 5.0)
    assert outcomes(signals) == {"lost": 1, "avoided": 1}
    assert not signals.readings(metrics.LEASES_LOST), "it was never held"


def test_a_job_that_is_short_of_leases_says_for_how_long(
    signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(checked=True)
    allocator = Allocator([TRAIN, SERVER], journal=journal)
    found = metrics_of(journal)
    monkeypatch.setattr("trio.current_time", lambda: 7.0)
    with found.shown(lambda: JobSnapshot("digits", state="allocating")):
        allocator.handle(Want("train", 2), 1.0)
        allocator.handle(Want("aggregate", 1), 2.0)
        assert signals.reading(metrics.ALLOCATION_WAIT, kind="train") == 6.0
        assert signals.reading(metrics.LEASES_WANTED, kind="train") == 2
        allocator.handle(Adopted("aggregate", "L", "W"), 3.0)
        assert signals.readings(metrics.ALLOCATION_WAIT) == {frozenset({("kind", "train")}): 6.0}
        states = by_label(signals, metrics.JOB_STATE, "state")
        assert states == {state: float(state == "allocating") for state in metrics.JOB_STATES}
    assert not signals.readings(metrics.JOB_STATE), "a run that is over is not shown"


@pytest.mark.parametrize("reason", ["expired", "refused", "gone", "dropped"])
def test_a_lease_that_ends_before_its_job_is_counted_by_the_reason(signals: Signals, reason: str) -> None:
    journal = Journal(checked=True)
    allocator = Allocator([TRAIN], journal=journal)
    metrics_of(journal)
    allocator.handle(Want("train", 1), 0.0)
    allocator.handle(Adopted("train", "L", "W"), 0.0)
    renewal = Renewal(10.0, 0.0, Random(1), "L", journal)
    renewal.handle(Tick(), 0.0)
    renewal.handle(Renewed(10.0), 0.25)
    assert signals.readings(metrics.RENEWALS) == {frozenset({("status", "success")}): 1}
    if reason != "dropped":
        renewal.handle(Tick(), renewal.next_wake)
    if reason == "refused":
        renewal.handle(RenewalRefused("lease", "unknown"), 8.0)
    elif reason == "expired":
        renewal.handle(RenewalFailed("no answer"), 8.0)
        renewal.handle(Tick(), 20.0)
    elif reason == "gone":
        renewal.handle(RenewalFailed("nobody listens", unreachable=True, gone=True), 8.0)
        # the next attempt was due at once
        renewal.handle(RenewalFailed("nobody listens", unreachable=True, gone=True), 9.5)
    allocator.handle(LeaseFailed("L"), 20.0)
    assert signals.readings(metrics.LEASES_LOST) == {frozenset({("kind", "train"), ("reason", reason)}): 1}
    failures = {"expired": 1, "refused": 1, "gone": 2, "dropped": 0}[reason]
    assert signals.reading(metrics.RENEWALS, status="failure") == failures
    assert signals.reading(metrics.RENEWAL_DURATION, status="success") == 1


def test_a_jobs_rounds_samples_and_slices_are_counted(signals: Signals) -> None:
    world = World(rules(), repeat=0.2, journal=Journal(checked=True, kept=10**6))
    found = metrics_of(world.journal, world)
    with found.shown(lambda: JobSnapshot("digits", state="training")):
        world.begin()
        world.add(Worker("a", 0.05))
        world.add(Worker("b", 0.12))
        world.run(600)
        assert isinstance(world.ended, Publish)
        assert signals.reading(metrics.ROUND) == signals.reading(metrics.SYNCHRONIZATIONS) == 5
        assert signals.reading(metrics.ROUND_DURATION) == 5
        entries = world.records.values()
        assert signals.reading(metrics.JOB_SAMPLES) == sum(entry.samples for entry in entries)
        slices = by_label(signals, metrics.SLICES, "state")
        assert sum(slices.values()) == len(world.samples)
        assert slices == world.machine.tracker.counts()
        assert by_label(signals, metrics.SLICES_ASSIGNED, "source")["fresh"] > 0
        assert by_label(signals, metrics.BATCH_TIME, "worker").keys() == {"a", "b"}
        refused = by_label(signals, metrics.MESSAGES_REFUSED, "reason")
        known = {"foreign slices", "lost samples"}
        assert refused == {
            what: count for what, count in world.machine.counts.items() if count and what not in known
        }
        assert refused, "a fifth of all messages came twice"
    found.ended("done", 600.0)
    assert signals.reading(metrics.JOB_DURATION, status="done") == 1


def followed(world: World, ratio: float | None = 1.0) -> RoundTraces:
    traces = RoundTraces(ratio)
    traces.begin("digits")
    for entry in world.journal.entries:
        traces.note(entry)
    world.journal.listeners.append(traces.note)
    return traces


def events_of(signals: Signals, round_: int) -> list[str]:
    (span,) = signals.spans("Round", hypha_round=round_)
    return [event.name for event in span.events]


def test_each_round_is_a_trace_of_its_own_with_known_identifiers(signals: Signals) -> None:
    world = World(rules(), journal=Journal(checked=True, kept=10**6))
    traces = followed(world)
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.12))
    world.run(600)
    traces.close()
    spans = signals.spans("Round")
    assert len(spans) == 5
    for number, span in enumerate(spans):
        attributes = dict(span.attributes or {})
        assert attributes == {"hypha.job": "job", "hypha.job.generation": 0, "hypha.round": number}
        assert span.parent is None
        assert span.status.is_ok
        context = span.get_span_context()
        assert context is not None
        assert (
            f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
            == round_traceparent("job", 0, number, 1.0)
            == traces.of_round(JobStamp(job_id="job"), number)
        )
        names = [event.name for event in span.events]
        assert names.count("update received") == 2
        # later ones may be heard of before the round is open here
        assert number or names.count("worker started") == 2
        assert names[-2:] == ["round closed", "round applied"]
        assert "round planned" in names
    (job,) = signals.spans("Run job")
    assert dict(job.attributes or {}) == {"hypha.job.name": "digits", "hypha.job": "job"}


def test_a_round_that_loses_a_worker_or_its_parameter_server_says_so(signals: Signals) -> None:
    world = World(rules(rounds=3), journal=Journal(checked=True, kept=10**6))
    traces = followed(world)
    world.begin()
    world.add(Worker("a", 0.05))
    world.add(Worker("b", 0.05))
    world.at(3.0, lambda: world.kill("b"))
    world.run(4)
    lost_in = world.machine.round
    world.at(0.0, lambda: world.feed(ServerLost("ps", "aggregate", "its lease ended")))
    world.run(1)
    traces.close()
    (span,) = signals.spans("Round", hypha_round=lost_in)
    assert not span.status.is_ok
    assert "its lease ended" in (span.status.description or "")
    everything = [name for number in range(lost_in + 1) for name in events_of(signals, number)]
    assert "train executor lost" in everything
    assert everything[-1] == "restart"


def test_a_scheduler_that_does_not_trace_has_no_rounds_and_tells_nobody(signals: Signals) -> None:
    world = World(rules(rounds=2))
    traces = followed(world, ratio=None)
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(600)
    traces.close()
    assert not signals.spans()
    assert traces.of_job is traces.of_round(JobStamp(job_id="job"), 0) is None
    assert traces.dispatching("a", "train") is None

"""What leaves the scheduler of its account: counters that only grow, gauges of those who are here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tests.scheduler.scene import Scene
from tests.scheduler.test_allocator import SERVER, TRAIN

from hypha.journal import Journal
from hypha.messages import CheckpointSaved, LedgerRound, UpdateStatistics
from hypha.node import Node
from hypha.scheduler.goodput.machine import Goodput
from hypha.scheduler.goodput.signals import GoodputSignals
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds.events import TimePassed
from hypha.scheduler.rounds.policy import Start
from hypha.scheduler.status.signals import JobMetrics
from hypha.scheduler.status.snapshot import JobSnapshot, Progressed
from hypha.telemetry import metrics


class Meter:
    """What an exporter would get now."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        metrics.bind(self.provider.get_meter("test"))

    def read(self, name: str) -> dict[tuple[str, ...], Any]:
        """By the values of its labels."""
        metrics.sample()
        data = self.reader.get_metrics_data()
        return {
            tuple(str(value) for value in (point.attributes or {}).values()): getattr(
                point, "value", getattr(point, "sum", None)
            )
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        }


@pytest.fixture
def meter() -> Iterator[Meter]:
    meter = Meter()
    yield meter
    metrics.unbind()
    meter.provider.shutdown()


@pytest.fixture
def told() -> Iterator[tuple[Scene, GoodputSignals]]:
    scene = Scene(start=None)
    signals = GoodputSignals(
        scene.journal, 2, 100.0, lambda: getattr(scene, "machine", None), scene.progressed
    )
    scene.begin(Start("job"))
    yield scene, signals
    signals.close()


Told = tuple[Scene, GoodputSignals]


def a_round(scene: Scene, began: float, *peers: str, cosine: float | None = 0.5) -> None:
    """Of four seconds."""
    scene.trains(began, *peers).at(began + 4)
    for peer in peers:
        scene.update(peer)
    scene.applied(
        *peers,
        updates=tuple(
            UpdateStatistics(worker=peer, norm=2.0, cosine=cosine, size_bytes=1000) for peer in peers
        ),
    )


def test_counters_grow_by_what_is_certain(told: Told, meter: Meter) -> None:
    scene, signals = told
    scene.opened()
    a_round(scene, 4, "a", "b")
    signals.report(scene.now)
    assert meter.read("hypha.job.goodput.seconds") == {(): 0.0}
    bad = meter.read("hypha.job.badput.seconds")
    assert (bad["allocating",], bad["loading",]) == (2.0, 4.0)
    scene.tell("ps", CheckpointSaved(round=1, place="scheduler"))
    for seconds in (9.1, 10.2):
        signals.report(scene.at(seconds).now)
        assert meter.read("hypha.job.goodput.seconds") == {(): 8.0}


def test_a_counter_never_goes_back_where_the_job_does(told: Told, meter: Meter) -> None:
    scene, signals = told
    scene.opened()
    a_round(scene, 4, "a", "b")
    scene.tell("ps", CheckpointSaved(round=1, place="scheduler"))
    signals.report(scene.now)
    scene.at(9).lease_lost("ps", "nobody is there any more: refused")
    scene.next_generation(0)
    report = signals.report(scene.now)
    assert report is not None
    assert (report.goodput_s, report.badput_s["replayed"]) == (0.0, 8.0)
    assert meter.read("hypha.job.goodput.seconds") == {(): 8.0}


def test_failures_and_what_they_took(told: Told, meter: Meter) -> None:
    scene, _ = told
    scene.opened().at(6).lease_lost("b", "expired; the last renewal: timed out")
    assert meter.read("hypha.job.failures") == {("train", "lease"): 1}
    assert meter.read("hypha.job.recovery.duration") == {("detect",): 2.0}


@contextmanager
def shown(scene: Scene, signals: GoodputSignals) -> Iterator[None]:
    """The gauges of the job, as its observer and its machine's carrier keep them."""
    pool = Pool(cast(Node, object()), [TRAIN, SERVER])
    found = JobMetrics(pool, scene.progressed, 5, 100.0, lambda: scene.machine, lambda: None)
    scene.journal.listeners.append(found.note)
    with found.shown(lambda: JobSnapshot("digits", goodput=signals.report(scene.now))):
        yield


@pytest.fixture
def now(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio.current_time", lambda: told[0].now)


@pytest.mark.usefixtures("now")
def test_what_each_worker_contributes_is_shown_while_it_does(told: Told, meter: Meter) -> None:
    with shown(*told):
        check_contributions(told[0], meter)


def check_contributions(scene: Scene, meter: Meter) -> None:
    scene.opened()
    a_round(scene, 4, "a", "b")
    assert meter.read("hypha.worker.update.norm") == {("a",): 2.0, ("b",): 2.0}
    assert meter.read("hypha.worker.update.cosine") == {("a",): 0.5, ("b",): 0.5}
    # two of a thousand bytes each; theta of four bytes went to two who asked, and to two members
    assert meter.read("hypha.job.round.bytes") == {("update",): 2000, ("theta",): 16}
    assert set(meter.read("hypha.worker.loss")) == {("a",), ("b",)}
    assert set(meter.read("hypha.job.loss")) == {()}
    scene.started("a")
    a_round(scene, 8, "a", cosine=None)
    assert meter.read("hypha.worker.update.norm") == {("a",): 2.0}
    assert meter.read("hypha.worker.update.cosine") == {}
    assert set(meter.read("hypha.worker.loss")) == {("a",)}


@pytest.mark.usefixtures("now")
def test_after_the_job_nothing_is_shown(told: Told, meter: Meter) -> None:
    scene, signals = told
    gauges = ("goodput", "loss", "round.bytes")
    with shown(scene, signals):
        scene.opened()
        a_round(scene, 4, "a", "b")
        assert all(meter.read(f"hypha.job.{name}") for name in gauges)
    assert [meter.read(f"hypha.job.{name}") for name in gauges] == [{}, {}, {}]
    signals.close()
    assert signals.listen not in scene.journal.listeners


def test_an_account_that_fails_is_given_up_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Goodput, entry: object) -> list[object]:
        raise KeyError("no")

    monkeypatch.setattr(Goodput, "handle", broken)
    journal = Journal()
    signals = GoodputSignals(journal, 2, 0.0, lambda: None, Progressed())
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            journal.note("rounds", 1.0, TimePassed(), (), {})
    assert signals.report(2.0) is None
    assert [one.getMessage() for one in caplog.records] == ["Goodput is not known any more: KeyError('no')"]


def test_samples_of_an_earlier_scheduler_count() -> None:
    progressed = Progressed()
    signals = GoodputSignals(Journal(), 2, 0.0, lambda: None, progressed)
    progressed.resume(LedgerRound(round=number, theta="", contributors=(), samples=10) for number in range(3))
    report = signals.report(5.0)
    assert report is not None
    assert (report.samples, report.samples_per_s) == (30, 0.0)

"""The registry, and what its instruments promise before any exporter sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from hypha.telemetry import instruments, metrics
from hypha.telemetry.metrics import MAX_SERIES, Counter, Gauge, Instrument, Label


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    metrics.bind(provider.get_meter("test"))
    yield reader
    metrics.unbind()
    provider.shutdown()


def points(reader: InMemoryMetricReader, name: str) -> list[tuple[dict[str, str], Any]]:
    metrics.sample()
    data = reader.get_metrics_data()
    return [
        (dict(point.attributes or {}), getattr(point, "value", None))
        for resource in (data.resource_metrics if data is not None else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


@pytest.mark.parametrize(
    ("instrument", "name"),
    [
        (instruments.RENEWALS, "hypha_lease_renewals_total"),
        (instruments.TRAINING_SAMPLES, "hypha_training_samples_total"),
        (instruments.FETCH_DURATION, "hypha_data_fetch_duration"),
        (instruments.BYTES_SENT, "hypha_network_bytes_sent_total"),
        (instruments.BYTES_RECEIVED, "hypha_network_bytes_received_total"),
        (instruments.ACTIVE_WORKERS, "hypha_active_workers"),
    ],
)
def test_the_specifications_names(instrument: Instrument, name: str) -> None:
    assert instrument.prometheus_name == name


@pytest.mark.parametrize("instrument", Instrument.declared.values(), ids=lambda one: one.name)
def test_each_is_declared_in_whole(instrument: Instrument) -> None:
    assert re.fullmatch(r"(hypha|system|process|hw)(\.[a-z_]+)+", instrument.name)
    # any other unit would be appended to the name in Prometheus
    assert re.fullmatch(r"\{[a-z_]+\}", instrument.unit)
    assert instrument.help.endswith(".")
    assert not instrument.name.endswith("total")
    for label in instrument.labels:
        assert label.values or label.bound, f"nothing bounds {label.name}"


def test_nothing_is_kept_while_metrics_are_off() -> None:
    instruments.RENEWALS.add(status="success")
    instruments.FETCH_DURATION.record(1.0, status="success")


def test_labels_are_all_those_declared(reader: InMemoryMetricReader) -> None:
    with pytest.raises(TypeError, match="status"):
        instruments.RENEWALS.add()
    with pytest.raises(TypeError, match="status"):
        instruments.RENEWALS.add(status="success", peer="12D3")


def test_a_counter_begins_at_zero_where_somebody_counts(reader: InMemoryMetricReader) -> None:
    assert points(reader, "hypha.lease.renewals") == []
    instruments.RENEWALS.begin()
    instruments.RENEWALS.add(status="failure")
    assert points(reader, "hypha.lease.renewals") == [({"status": "success"}, 0), ({"status": "failure"}, 1)]


def test_a_value_that_nobody_declared_is_other(reader: InMemoryMetricReader) -> None:
    instruments.RENEWALS.add(status="perhaps")
    assert points(reader, "hypha.lease.renewals") == [({"status": "other"}, 1)]


def test_series_are_bounded(reader: InMemoryMetricReader) -> None:
    for number in range(MAX_SERIES + 50):
        instruments.SERVED_BYTES.add(1, dataset=str(number))
    found = {tuple(labels.items()): value for labels, value in points(reader, "hypha.data.served.bytes")}
    assert found.pop((("otel.metric.overflow", "true"),)) == 50
    assert len(found) <= MAX_SERIES


def test_a_gauge_shows_what_there_is_now(reader: InMemoryMetricReader) -> None:
    there = {"a": 1.0, "b": 2.0}
    with instruments.ROUND_TRIP.watch(lambda: [({"peer": peer}, value) for peer, value in there.items()]):
        assert len(points(reader, "hypha.network.round_trip")) == 2
        del there["a"]
        assert points(reader, "hypha.network.round_trip") == [({"peer": "b"}, 2.0)]
    assert points(reader, "hypha.network.round_trip") == []


def test_peers_that_come_and_go_do_not_use_up_the_bound(reader: InMemoryMetricReader) -> None:
    now = "0"
    with instruments.ROUND_TRIP.watch(lambda: [({"peer": now}, 1.0)]):
        for number in range(MAX_SERIES + 10):
            now = str(number)
            metrics.sample()
        assert points(reader, "hypha.network.round_trip") == [({"peer": now}, 1.0)]


def test_a_gauge_that_cannot_be_read_harms_nobody(
    reader: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> float:
        raise RuntimeError("no")

    with instruments.UPTIME.watch(broken), instruments.ACTIVE_WORKERS.watch(lambda: 2):
        assert points(reader, "hypha.uptime") == []
        assert points(reader, "hypha.active.workers") == [({}, 2)]
    assert "hypha.uptime cannot be read" in caplog.text


def test_a_name_is_declared_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        Counter("hypha.lease.renewals", "renewal", "Again.")


def test_an_open_label_is_kept_as_it_is() -> None:
    gauge = Gauge("hypha.test.open", "thing", "Open.", Label("name", bound="this test"))
    try:
        assert gauge.attributes({"name": "anything"}) == {"name": "anything"}
    finally:
        del Instrument.declared["hypha.test.open"]


def test_a_gauge_that_cannot_be_read_is_reported_once(
    reader: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    broken = True

    def source() -> float:
        if broken:
            raise RuntimeError("no")
        return 1.0

    metrics.sample()
    with instruments.UPTIME.watch(source):
        for _ in range(5):
            metrics.sample()
        assert caplog.text.count("cannot be read") == 1
        broken = False
        metrics.sample()
        broken = True
        metrics.sample()
    assert caplog.text.count("cannot be read") == 2

"""What a metric is, and how one is recorded.

An instrument is declared once, in :mod:`hypha.telemetry.instruments`, and recorded wherever something
happens: ``RENEWALS.add(status="success")``. While metrics are off that is one comparison and nothing of the
OpenTelemetry SDK is loaded. :func:`bind` gives all instruments of a process to a meter.

Counters and histograms may be recorded from any thread. Gauges belong to the thread that runs the node: what
they show is read there by :func:`sample`, every few seconds, and the exporter's own thread gets the last
such reading. So nobody iterates over a node's state while it changes, and who has left is not shown any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

logger = logging.getLogger(__name__)

#: label sets that one instrument keeps apart (the SDK stops at 2000); what is more is counted together
MAX_SERIES = 1000
#: the value of a label that is not one of those declared
OTHER = "other"
#: bounds for what waits for a network
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_OVERFLOW = {"otel.metric.overflow": "true"}

#: labels -> value
Reading = tuple[Mapping[str, str], float]
Source = Callable[[], float | Iterable[Reading]]


@dataclass(frozen=True)
class Label:
    """``values`` are all that there are; a label without has as many as ``bound`` says."""

    name: str
    values: tuple[str, ...] = ()
    bound: str = ""


class Instrument:
    """One metric. Its ``unit`` is exported in braces, so that the name in Prometheus is the declared one:
    dots become underscores, and a counter gets ``_total``.
    """

    kind: ClassVar[str]
    #: all of them, in the order in which they were declared
    declared: ClassVar[dict[str, Instrument]] = {}

    def __init__(self, name: str, unit: str, help_: str, *labels: Label) -> None:
        if name in Instrument.declared:
            raise ValueError(f"{name} is declared twice")
        self.name = name
        self.unit = f"{{{unit}}}"
        self.help = help_
        self.labels = labels
        self._known = {label.name: frozenset(label.values) for label in labels}
        self._seen: set[tuple[str, ...]] = set()
        self._sink: Any = None
        Instrument.declared[name] = self

    @property
    def prometheus_name(self) -> str:
        """What PromQL calls it; of a histogram the stem of its ``_bucket``, ``_sum`` and ``_count``."""
        stem = self.name.replace(".", "_")
        return f"{stem}_total" if self.kind == "counter" else stem

    def attributes(self, labels: Mapping[str, str]) -> dict[str, str]:
        """``labels`` as they are exported: all that are declared, bounded in values and in number."""
        if labels.keys() != self._known.keys():
            raise TypeError(f"{self.name} has the labels {sorted(self._known)}, not {sorted(labels)}")
        bounded = {
            name: value if not (known := self._known[name]) or value in known else OTHER
            for name, value in labels.items()
        }
        key = tuple(bounded[name] for name in self._known)
        if key not in self._seen:
            if len(self._seen) >= MAX_SERIES:
                return dict(_OVERFLOW)
            self._seen.add(key)
        return bounded

    def make(self, meter: Any) -> None:
        """Record into ``meter`` from now on."""
        raise NotImplementedError

    def drop(self) -> None:
        """Record nowhere any more."""
        self._sink = None
        self._seen.clear()


class Counter(Instrument):
    """Only grows."""

    kind = "counter"

    def add(self, amount: float = 1, /, **labels: str) -> None:
        """Add ``amount``, which is not negative."""
        # read once: it is taken away while threads may still count
        if (sink := self._sink) is not None:
            sink.add(amount, self.attributes(labels))

    def begin(self) -> None:
        """Show all series, whose label values must be declared, from 0 on: a rate cannot tell that one which
        is new has grown. Who counts calls this, so that others do not show what they never do.
        """
        for values in product(*(label.values for label in self.labels)):
            self.add(0, **dict(zip(self._known, values, strict=True)))

    def make(self, meter: Any) -> None:
        self._sink = meter.create_counter(self.name, self.unit, self.help)


class Histogram(Instrument):
    """A distribution of durations, in buckets with the upper ``bounds``."""

    kind = "histogram"

    def __init__(self, name: str, help_: str, *labels: Label, bounds: Sequence[float] = SECONDS) -> None:
        super().__init__(name, "second", help_, *labels)
        self.bounds = tuple(bounds)

    def record(self, value: float, /, **labels: str) -> None:
        """Count ``value``, in seconds."""
        if (sink := self._sink) is not None:
            sink.record(value, self.attributes(labels))

    def make(self, meter: Any) -> None:
        self._sink = meter.create_histogram(
            self.name, self.unit, self.help, explicit_bucket_boundaries_advisory=self.bounds
        )


class Gauge(Instrument):
    """What is so now."""

    kind = "gauge"

    def __init__(self, name: str, unit: str, help_: str, *labels: Label) -> None:
        super().__init__(name, unit, help_, *labels)
        self._sources: list[Source] = []
        self._latest: tuple[Reading, ...] = ()
        self._unread = False

    @contextlib.contextmanager
    def watch(self, source: Source) -> Iterator[None]:
        """Show what ``source()`` returns: one value, or one with labels for each that there is."""
        self._sources.append(source)
        try:
            yield
        finally:
            self._sources.remove(source)

    def sample(self) -> None:
        """Read all sources; one that fails shows nothing, harms nobody, and is reported once."""
        unread: Exception | None = None
        found: list[Reading] = []
        self._seen = set()
        for source in tuple(self._sources):
            try:
                read = source()
                pairs = [({}, read)] if isinstance(read, int | float) else list(read)
                found += [(self.attributes(labels), value) for labels, value in pairs]
            except Exception as exc:  # noqa: BLE001 - the edge of a service: what shows a node must not end it
                unread = exc
        if unread is not None and not self._unread:
            logger.warning("%s cannot be read: %r", self.name, unread)
        self._unread = unread is not None
        self._latest = tuple(found)

    def make(self, meter: Any) -> None:
        from opentelemetry.metrics import Observation

        self._sink = meter.create_observable_gauge(
            self.name,
            [lambda options: [Observation(value, at) for at, value in self._latest]],
            self.unit,
            self.help,
        )

    def drop(self) -> None:
        super().drop()
        self._latest = ()


def bind(meter: Any) -> None:
    for instrument in Instrument.declared.values():
        instrument.make(meter)


def unbind() -> None:
    for instrument in Instrument.declared.values():
        instrument.drop()


def sample() -> None:
    """Read all gauges; to be called in the thread that runs the node."""
    for instrument in Instrument.declared.values():
        if isinstance(instrument, Gauge):
            instrument.sample()

"""The gauges of a worker: its executors and leases, what is free, and its cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from hypha.messages import ExecutorClass, Resources
from hypha.telemetry import instruments as metrics
from hypha.telemetry.metrics import Reading
from hypha.worker.jobs.jobs import Jobs
from hypha.worker.leasing.service import LeaseService
from hypha.worker.slices.cache import SliceCache

_KINDS: tuple[ExecutorClass, ...] = ("train", "aggregate")


@contextlib.contextmanager
def shown(jobs: Jobs, lease_service: LeaseService, cache: SliceCache) -> Iterator[None]:
    """The worker's gauges show these meanwhile."""

    def leases() -> Iterable[Reading]:
        accepted = [lease.accepted for lease in lease_service.leases]
        return [
            ({"state": "accepted"}, accepted.count(True)),
            ({"state": "temporary"}, accepted.count(False)),
        ]

    def amounts(of: Resources) -> Iterable[Reading]:
        return [({"resource": name}, getattr(of, name)) for name in ("cpu", "memory", "gpu", "storage")]

    counters = (metrics.TRAINING_SAMPLES, metrics.WORKER_OFFERS, metrics.CACHE_LOOKUPS)
    for counter in (*counters, metrics.LIMITS_EXCEEDED):
        counter.begin()
    with (
        metrics.WORKER_JOBS.watch(lambda: [({"kind": kind}, jobs.running(kind)) for kind in _KINDS]),
        metrics.WORKER_LEASES.watch(leases),
        metrics.RESOURCES_FREE.watch(lambda: amounts(lease_service.arbiter.book.free)),
        metrics.RESOURCES_CAPACITY.watch(lambda: amounts(lease_service.arbiter.book.total)),
        metrics.CACHE_BYTES.watch(lambda: float(cache.size_bytes)),
        metrics.WORKER_PRICE.watch(lambda: prices(lease_service)),
        metrics.WORKER_LOAD.watch(lambda: lease_service.arbiter.pricing.load),
    ):
        yield


def prices(lease_service: LeaseService) -> list[Reading]:
    """What the worker takes for a lease, and gets for those that it has given."""
    pricing = lease_service.arbiter.pricing
    return [
        ({"of": "floor"}, pricing.terms.floor),
        ({"of": "rest"}, pricing.at_rest),
        ({"of": "threshold"}, pricing.asked),
        ({"of": "leases"}, sum(lease.price for lease in lease_service.leases if lease.accepted)),
    ]

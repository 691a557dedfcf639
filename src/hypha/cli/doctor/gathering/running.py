"""A node that runs, by its local HTTP: the job's goodput, and what its metrics count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from hypha.cli.doctor.gathered import Running
from hypha.cli.doctor.gathering.ports import ask_http
from hypha.decoding import decode, decode_json
from hypha.errors import Undecodable
from hypha.scheduler.status.snapshot import JobSnapshot


async def gather_running(http_address: str, scheduler: bool) -> Running:
    """Empty where it says nothing."""
    badput: dict[str, float] = {}
    if scheduler and (body := await ask_http(http_address, "/status")) is not None:
        badput = shares_in(body)
    body = await ask_http(http_address, "/metrics")
    return Running(badput) if body is None else counted(badput, body)


def shares_in(status: bytes) -> dict[str, float]:
    """Of all worker seconds of a job, by what they went to."""
    try:
        goodput = decode_json(status, JobSnapshot).goodput
    except Undecodable:
        return {}
    if goodput is None or goodput.places * goodput.wall_s <= 0:
        return {}
    whole_s = goodput.places * goodput.wall_s
    return {reason: spent_s / whole_s for reason, spent_s in goodput.badput_s.items()}


def counted(badput: dict[str, float], metrics: bytes) -> Running:
    """What the text of ``/metrics`` counts."""
    try:
        samples = decode(_samples, metrics.decode(errors="replace"))
    except Undecodable:
        samples = []

    def total(name: str, **labels: str) -> float:
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    fetches = total("hypha_data_fetch_duration_count")
    seconds = total("hypha_data_fetch_duration_sum")
    return Running(
        badput=badput,
        renewals=int(total("hypha_lease_renewals_total")),
        failed_renewals=int(total("hypha_lease_renewals_total", status="failure")),
        fetches=int(fetches),
        failed_fetches=int(total("hypha_data_fetch_duration_count", status="failure")),
        mean_fetch_s=seconds / fetches if fetches else None,
        announcements=int(
            total("hypha_dht_queries_total", side="client", operation="provide", status="success")
        ),
        requests=_by_outcome(samples, "hypha_worker_offers_total"),
        offers=_by_outcome(samples, "hypha_scheduler_offers_total"),
        training=int(total("hypha_worker_jobs", kind="train")),
        gpu_utilization=tuple(_values(samples, "hypha_worker_gpu_utilization")),
    )


def _samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def _by_outcome(samples: Iterable[Sample], name: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one in samples:
        if one.name == name and one.value > 0:
            found[one.labels.get("outcome", "other")] += int(one.value)
    return dict(found)


def _values(samples: Iterable[Sample], name: str) -> Iterable[float]:
    return (one.value for one in samples if one.name == name)

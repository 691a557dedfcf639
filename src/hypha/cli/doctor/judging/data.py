"""The job's dataset: who announces it, who serves it, and how fast."""

from __future__ import annotations

from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Finding
from hypha.cli.doctor.gathered import DatasetObservations, Provider, ServiceObservations

#: as the alert SlowDataFetch
SLOW_S = 60.0
MB = 10**6


def judge_dataset(observed: DatasetObservations) -> Iterator[Finding]:
    """All of it."""
    serving = [one for one in observed.providers if one.manifest_hash]
    if not observed.providers:
        if observed.near:
            near = " and ".join(map(repr, observed.near))
            yield checks.DATASET_NAME.found(f"nobody announces {observed.name!r}, but {near} is announced")
        else:
            yield checks.DATASET_NOT_ANNOUNCED.found(f"nobody announces {observed.name!r} at the gateways")
    for one in observed.providers:
        if one.reason:
            check = checks.DATASET_REFUSED if one.refused else checks.DATASET_UNREACHABLE
            yield check.found(
                f"{_called(one)} announces {observed.name!r}: {one.reason}",
                severity="warning" if serving else "error",
            )
    yield from _hashes(observed, serving)
    for one in serving:
        yield from _way(one, observed.name)


def judge_served(observed: ServiceObservations, wanted: str | None) -> Iterator[Finding]:
    """Whether a data node can serve what it is to, has announced it, and serves what a job ``wanted``."""
    for place, problem in observed.unusable:
        yield checks.DATASET_UNUSABLE.found(
            f"{place}: {problem}", f"`hypha-data prepare <source> {place}`, or correct its path"
        )
    served = ", ".join(map(repr, observed.names)) or "nothing"
    if observed.announced is False and observed.names:
        yield checks.DATASET_NOT_ANNOUNCED.found(
            f"this data node runs, and no gateway has taken its announcement of {served}",
            "look at the findings of its gateways, and at its log",
        )
    if wanted is not None and wanted not in observed.names:
        yield checks.DATASET_NAME.found(f"the job wants {wanted!r}, and this data node serves {served}")


def _called(one: Provider) -> str:
    return one.name or one.peer


def _hashes(observed: DatasetObservations, serving: list[Provider]) -> Iterator[Finding]:
    by_hash: dict[str, list[str]] = {}
    for one in serving:
        by_hash.setdefault(one.manifest_hash, []).append(_called(one))
    if len(by_hash) > 1:
        groups = "; ".join(f"{value[:16]} at {', '.join(who)}" for value, who in sorted(by_hash.items()))
        yield checks.DATASET_DIFFERS.found(f"{observed.name!r} has several manifests: {groups}")
    if observed.pinned is not None and by_hash and observed.pinned not in by_hash:
        yield checks.DATASET_DIFFERS.found(
            f"nobody serves {observed.name!r} with the manifest {observed.pinned[:16]} that the job names",
            "set scheduler.job.dataset.manifest_hash to what `hypha-data verify` says, or leave it out",
            "error",
        )


def _way(one: Provider, name: str) -> Iterator[Finding]:
    if one.relayed:
        yield checks.DATA_RELAYED.found(f"{_called(one)}, which serves {name!r}, is reached through a relay")
    if one.rate is not None and one.largest_slice > SLOW_S * one.rate:
        takes = f"{one.largest_slice / one.rate:.0f} s" if one.rate > 0 else "for ever"
        yield checks.SLICE_SLOW.found(
            f"a slice of {name!r} has up to {one.largest_slice / MB:.0f} MB, which take {takes} from "
            f"{_called(one)} to here"
        )

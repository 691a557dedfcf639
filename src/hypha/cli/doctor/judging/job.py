"""A job: its size, its dataset, and what its nodes report of themselves while they run."""

from __future__ import annotations

from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding
from hypha.cli.doctor.gathered import Contact, DatasetObservations, Provider, Running, ServiceObservations
from hypha.config.job import JobConfig

GB = 10**9
MB = 10**6
#: of a slice, as the alert SlowDataFetch
SLOW_S = 60.0
#: of all worker seconds
MUCH = 0.2
#: as the alert HighLeaseRenewalFailures
FAILING = 0.1
IDLE = 0.5
#: of fewer nothing follows
ENOUGH = 10
_BADPUT = {
    "waiting-for-stragglers": (checks.STRAGGLERS, "waiting for slower workers"),
    "waiting-for-data": (checks.WAITING_FOR_DATA, "waiting for data"),
    "waiting-for-theta": (checks.SYNCHRONIZATION_OVERHEAD, "synchronising"),
}
_TERMS = {
    "executor": checks.OFFER_EXECUTOR,
    "features": checks.OFFER_FEATURES,
    "resources": checks.OFFER_RESOURCES,
    "price": checks.OFFER_PRICE,
    "disk": checks.DISK_FULL,
}
#: theta, its momentum and one sum of updates, in fp32
BYTES_AT_SERVER = 3 * 4
#: of an update, by encoding
BYTES_OF_UPDATE = {"none": 4, "bf16": 2, "int8": 1}
BYTES_OF_THETA = 4


def judge_job(job: JobConfig, parameters: int | None, gateways: tuple[Contact, ...]) -> Iterator[Finding]:
    """``parameters`` are the numbers in the model's tensors, where known; ``gateways`` tell how fast the line
    is.
    """
    if not parameters:
        return
    needed = parameters * BYTES_AT_SERVER / GB
    offered = job.resources.parameter_server.memory
    if 0 < offered < needed:
        yield checks.PARAMETER_SERVER_SMALL.found(
            f"a model of {parameters} parameters takes {needed:.3g} GB at the parameter server, and "
            f"resources.parameter_server.memory is {offered:g}",
            f"set scheduler.job.resources.parameter_server.memory to at least {needed + 0.5:.1f}",
        )
    ups = [one.up for one in gateways if one.up]
    downs = [one.down for one in gateways if one.down]
    if not ups or not downs:
        return
    up_s = parameters * BYTES_OF_UPDATE.get(job.update_encoding, 4) / max(ups)
    down_s = parameters * BYTES_OF_THETA / max(downs)
    if up_s + down_s > job.rounds.deadline_s:
        yield checks.UPDATE_SLOW.found(
            f"over this line an update takes {up_s:.0f} s and theta {down_s:.0f} s, and a round is closed "
            f"{job.rounds.deadline_s:g} s after its projected end (rounds.deadline_s)"
        )


def judge_dataset(observed: DatasetObservations) -> Iterator[Finding]:
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


def judge_running(observed: Running) -> Iterator[Finding]:
    for reason, share in observed.badput.items():
        if reason in _BADPUT and share > MUCH:
            check, words = _BADPUT[reason]
            yield check.found(f"{share:.0%} of the workers' time so far went to {words}")
    if observed.renewals >= ENOUGH and observed.failed_renewals > FAILING * observed.renewals:
        yield checks.RENEWALS_FAIL.found(
            f"{observed.failed_renewals} of {observed.renewals} lease renewals of this scheduler have failed"
        )
    if observed.fetches >= ENOUGH and observed.failed_fetches > FAILING * observed.fetches:
        yield checks.FETCHES_FAIL.found(
            f"{observed.failed_fetches} of {observed.fetches} fetches of slices failed"
        )
    elif observed.mean_fetch_s is not None and observed.mean_fetch_s > SLOW_S:
        yield checks.FETCHES_FAIL.found(f"a slice takes {observed.mean_fetch_s:.0f} s to fetch in the mean")
    yield from _outcomes(
        observed.requests, "offered", "requests that this worker has heard none got an offer"
    )
    yield from _outcomes(
        observed.offers, "accepted", "offers that this scheduler has received none was taken"
    )
    if observed.training and observed.gpu_utilization and max(observed.gpu_utilization) < IDLE:
        yield checks.GPU_IDLE.found(
            f"an executor trains, and the GPU is used for {max(observed.gpu_utilization):.0%}"
        )


def _outcomes(counts: dict[str, int], good: str, words: str) -> Iterator[Finding]:
    """Where nothing came of all of them: the term that failed most often."""
    failed = {outcome: count for outcome, count in counts.items() if outcome in _TERMS}
    if counts.get(good) or not failed:
        return
    worst = max(failed, key=lambda outcome: failed[outcome])
    yield _TERMS[worst].found(
        f"of {sum(counts.values())} {words}, {failed[worst]} of them for {worst}",
        "look at the log for which amounts, or `hypha doctor -c <worker.toml> --job <scheduler.toml>`",
        "warning",
    )

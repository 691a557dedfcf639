"""A job: its size, its dataset, what its nodes report of themselves while they run, and whether a worker's
offer would be taken by its request.

Of offers nothing is compared here that the two do not compare: the worker's own arbiter is told of the
request that the job's scheduler would publish, and the scheduler's own allocator of the offer made for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import structs

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding, Severity
from hypha.cli.doctor.gathered import Contact, DatasetObservations, Provider, Running, ServiceObservations
from hypha.cli.doctor.judging.machine import offered_by
from hypha.config.job import JobConfig
from hypha.config.models import WorkerConfig
from hypha.config.offers import OfferConfig
from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources
from hypha.rules.leases import Tick
from hypha.rules.resources import TOLERANCE
from hypha.scheduler.descriptions import searches_of
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import Advertise, Decline, Offered, Search, SearchTimes, Want
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import Ignored, RequestReceived, SendOffer
from hypha.worker.leasing.terms import WorkerCapacity
from hypha.worker.limits.detecting import DetectedMachine
from hypha.worker.limits.gpus import memory_of_each

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
#: by the term of an offer that fails
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
#: nobody's: only that they differ counts
_SCHEDULER, _WORKER = PeerRef(peer="scheduler"), PeerRef(peer="worker")
#: between an offer and its acceptance lie a journey there and one back, over the slowest line
_JOURNEYS_S = 1.0
_ROLES: dict[ExecutorClass, str] = {"train": "worker", "aggregate": "parameter_server"}
_TASKS: dict[ExecutorClass, str] = {"train": "train", "aggregate": "be the parameter server"}


def judge_job(job: JobConfig, parameters: int | None, gateways: tuple[Contact, ...]) -> Iterator[Finding]:
    """``parameters`` are numbers in the model's tensors; ``gateways`` tell how fast the line is."""
    if not parameters:
        return
    needed = parameters * BYTES_AT_SERVER / GB
    offered = job.resources.parameter_server.memory
    if 0 < offered < needed:
        yield checks.PARAMETER_SERVER_SMALL.found(
            f"a model of {parameters} parameters takes {needed:.3g} GB at the parameter server, and "
            f"resources.parameter_server.memory is {offered:g}",
            GB=f"{needed + 0.5:.1f}",
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
                f"{one.called} announces {observed.name!r}: {one.reason}",
                severity="warning" if serving else "error",
            )
    yield from _hashes(observed, serving)
    for one in serving:
        yield from _way(one, observed.name)


def judge_served(observed: ServiceObservations, wanted: str | None) -> Iterator[Finding]:
    """Whether a data node can serve what it is to, has announced it, and serves what a job ``wanted``."""
    for place, problem in observed.unusable:
        yield checks.DATASET_UNUSABLE.found(f"{place}: {problem}", directory=place)
    served = ", ".join(map(repr, observed.names)) or "nothing"
    if observed.announced is False and observed.names:
        yield checks.DATASET_NOT_ANNOUNCED.found(
            f"this data node runs, and no gateway has taken its announcement of {served}",
            "look at the findings of its gateways, and at its log",
        )
    if wanted is not None and wanted not in observed.names:
        yield checks.DATASET_NAME.found(f"the job wants {wanted!r}, and this data node serves {served}")


def _hashes(observed: DatasetObservations, serving: list[Provider]) -> Iterator[Finding]:
    by_hash: dict[str, list[str]] = {}
    for one in serving:
        by_hash.setdefault(one.manifest_hash, []).append(one.called)
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
        yield checks.DATA_RELAYED.found(f"{one.called}, which serves {name!r}, is reached through a relay")
    if one.rate is not None and one.largest_slice > SLOW_S * one.rate:
        takes = f"{one.largest_slice / one.rate:.0f} s" if one.rate > 0 else "for ever"
        yield checks.SLICE_SLOW.found(
            f"a slice of {name!r} has up to {one.largest_slice / MB:.0f} MB, which take {takes} from "
            f"{one.called} to here"
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


@dataclass(frozen=True)
class OfferOutcome:
    """An offer that is taken (``term`` is None), or which term fails, and in whose words."""

    ask: Search
    term: str | None = None
    reason: str = ""
    by: Literal["worker", "scheduler"] = "worker"
    #: nothing fails any more once the job has raised its bid to its maximum
    once_raised: bool = False


def capacity_of(worker: WorkerConfig, machine: DetectedMachine | None = None) -> WorkerCapacity:
    """What a worker of this version offers; ``machine`` bounds it, where it is known."""
    offered, _ = offered_by(worker, machine)
    executors = [ExecutorDescriptor(kind=one.kind, name=one.name) for one in worker.executors]
    gpus = () if machine is None else memory_of_each(machine.gpus, offered.gpu)
    return WorkerCapacity(offered, executors, gpus)


def try_offers(capacity: WorkerCapacity, terms: OfferConfig, job: JobConfig) -> list[OfferOutcome]:
    """For a training executor, and for a parameter server: at the job's bid, else at what it raises that to
    while nobody comes. Raises ConfigError for a job that is none.
    """
    pace = SearchTimes(offer_deadline_s=job.resources.offer_deadline_s)
    outcomes = []
    for ask in searches_of(job):
        outcome = _outcome(capacity, terms, ask, pace)
        if outcome.term == "price" and ask.raise_after_s is not None and ask.max_price > ask.bid:
            later = _outcome(capacity, terms, structs.replace(ask, bid=ask.max_price), pace)
            outcome = replace(outcome, once_raised=later.term is None)
        outcomes.append(outcome)
    return outcomes


def _outcome(capacity: WorkerCapacity, terms: OfferConfig, ask: Search, pace: SearchTimes) -> OfferOutcome:
    allocator, arbiter = Allocator((ask,), pace), Arbiter(capacity, terms, lambda: _WORKER)
    (published,) = (one for one in allocator.handle(Want(ask.kind, 1), 0.0) if isinstance(one, Advertise))
    request = published.request(_SCHEDULER)
    decided = [
        *arbiter.handle(RequestReceived(_SCHEDULER.peer, request), 0.0),
        *arbiter.handle(Tick(), min(terms.request_window_s, request.offer_within_s / 2)),
    ]
    for one in decided:
        if isinstance(one, Ignored):
            return OfferOutcome(ask, one.cause, one.reason)
    offer = next((one.offer for one in decided if isinstance(one, SendOffer)), None)
    if offer is None:
        return OfferOutcome(ask, "other", "it makes no offer")
    for answer in allocator.handle(Offered(_WORKER.peer, offer), 0.1):
        if isinstance(answer, Decline):
            reason = answer.reason
            if answer.cause == "price":
                reason = f"its price is {offer.price:g}, and the job pays {ask.max_price:g} at most"
            return OfferOutcome(ask, answer.cause, reason, "scheduler")
    return OfferOutcome(ask)


def judge_offers(capacity: WorkerCapacity, terms: OfferConfig, job: JobConfig) -> Iterator[Finding]:
    """Which term fails, for both classes of executors; a worker need not be good for both."""
    outcomes = try_offers(capacity, terms, job)
    good = any(one.term is None or one.once_raised for one in outcomes)
    for outcome in outcomes:
        if outcome.term is None:
            continue
        severity: Severity = "error"
        if good:
            severity = "note" if outcome.term == "executor" or outcome.once_raised else "warning"
        yield _finding(capacity.total, terms, job, outcome, severity)
    deadline_s = job.resources.offer_deadline_s
    if good and terms.temporary_lease_s < deadline_s + _JOURNEYS_S:
        yield checks.LEASE_SHORT.found(
            f"offer.temporary_lease_s is {terms.temporary_lease_s:g} s, and the job collects offers "
            f"for {deadline_s:g} s before it takes one",
            f"set offer.temporary_lease_s to at least {deadline_s + 4 * _JOURNEYS_S:g} (the default is 5)",
        )


def _finding(
    offered: Resources, terms: OfferConfig, job: JobConfig, outcome: OfferOutcome, severity: Severity
) -> Finding:
    ask, kind = outcome.ask, outcome.ask.kind
    term, role = outcome.term or "other", _ROLES[outcome.ask.kind]
    what = f"this worker would not {_TASKS[kind]} for {job.name!r}: {outcome.reason}"
    mend = None
    if term == "resources":
        amounts = {
            name: (getattr(ask.resources, name), getattr(offered, name)) for name in offered.__struct_fields__
        }
        short = {name: pair for name, pair in amounts.items() if pair[0] > pair[1] + TOLERANCE}
        if short:
            words = (
                f"{name}: {asked:g} is asked for, {there:g} offered" for name, (asked, there) in short.items()
            )
            what += f" ({'; '.join(words)})"
            names = " and ".join(short)
            mend = f"raise {names} in the worker's [resources], or lower it in scheduler.job.resources.{role}"
    elif term == "price":
        bid, price = ask.bid, f"scheduler.job.resources.{role}_price"
        if outcome.by == "worker":
            what += f" and the job bids {bid:g}"
            mend = f"lower offer.floor to {bid:g}, or raise {price}.bid to {terms.floor:g}"
            if bid >= terms.floor:
                mend = f"lower offer.price to {bid:g}, set offer.counter = true, or raise {price}.bid"
            if outcome.once_raised:
                what += f"; it will, once the job has raised its bid towards {ask.max_price:g}"
        else:
            mend = f"lower offer.price to {ask.max_price:g}, or raise {price}.max to {terms.price:g}"
    elif term == "executor":
        mend = (
            f'add an [[executors]] entry with class = "{kind}" and name = "{ask.executor.name}", or correct '
            f"scheduler.job.resources.{role}_executor"
        )
    return _TERMS.get(term, checks.OFFER_RESOURCES).found(what, mend, severity)

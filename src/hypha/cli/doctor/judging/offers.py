"""Would this worker's offer be taken by that scheduler's request, and if not, which term fails.

Nothing is compared here that the two do not compare: the worker's own arbiter is told of the request that
the job's scheduler would publish, and the scheduler's own allocator of the offer that comes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import structs

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Check, Finding, Severity
from hypha.cli.doctor.judging.machine import offered_by
from hypha.config.job import JobConfig
from hypha.config.models import WorkerConfig
from hypha.features import OURS, Abilities, needs
from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources, WorkerOffer
from hypha.rules.leases import Tick
from hypha.rules.resources import TOLERANCE
from hypha.scheduler.descriptions import searches_for
from hypha.scheduler.durable.starts import described
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import Advertise, Decline, Offered, Search, SearchTimes, Want
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import Ignored, RequestReceived, SendOffer
from hypha.worker.leasing.vetting import WorkerCapacity
from hypha.worker.limits.detecting import DetectedMachine
from hypha.worker.limits.devices import memory_of_each

#: nobody's: only that they differ counts
_SCHEDULER, _WORKER = PeerRef(peer="scheduler"), PeerRef(peer="worker")
#: between an offer and its acceptance lie a journey there and one back, over the slowest line
_JOURNEYS_S = 1.0
Term = Literal["executor", "features", "resources", "price", "other"]
_CHECKS: dict[Term, Check] = {
    "executor": checks.OFFER_EXECUTOR,
    "features": checks.OFFER_FEATURES,
    "resources": checks.OFFER_RESOURCES,
    "price": checks.OFFER_PRICE,
    "other": checks.OFFER_RESOURCES,
}
_ROLES: dict[ExecutorClass, str] = {"train": "worker", "aggregate": "parameter_server"}
_WORDS: dict[ExecutorClass, str] = {"train": "train", "aggregate": "be the parameter server"}


@dataclass(frozen=True)
class OfferOutcome:
    """What came of a request for ``ask``: an offer that is taken (``term`` is None), or which term fails, and
    in whose words.
    """

    ask: Search
    term: Term | None = None
    reason: str = ""
    by: Literal["worker", "scheduler"] = "worker"
    #: nothing fails any more once the job has raised its bid to its maximum
    once_raised: bool = False


def try_offers(
    worker: WorkerConfig, job: JobConfig, machine: DetectedMachine | None = None, abilities: Abilities = OURS
) -> tuple[OfferOutcome, OfferOutcome]:
    """For a training executor, and for a parameter server; ``machine`` bounds what the worker offers, where
    it is known, and ``abilities`` are those of its version. Raises ConfigError for a job that is none.
    """
    train, aggregate = described(job, _SCHEDULER, "job")
    asks = searches_for(
        job.resources,
        job.dataset.dataset,
        {"train": needs(train), "aggregate": needs(aggregate)},
        job.rounds.max_batch_size if job.rounds.batch_size is None else 1,
    )
    first, second = (_best(worker, job, ask, machine, abilities) for ask in asks)
    return first, second


def _best(
    worker: WorkerConfig, job: JobConfig, ask: Search, machine: DetectedMachine | None, abilities: Abilities
) -> OfferOutcome:
    """At the job's bid, else at what it raises that to while nobody comes."""
    outcome = _outcome(worker, job, ask, machine, abilities)
    if outcome.term != "price" or ask.raise_after_s is None or not ask.max_price > ask.bid:
        return outcome
    later = _outcome(worker, job, structs.replace(ask, bid=ask.max_price), machine, abilities)
    return outcome if later.term is not None else replace(outcome, once_raised=True)


def _outcome(
    worker: WorkerConfig, job: JobConfig, ask: Search, machine: DetectedMachine | None, abilities: Abilities
) -> OfferOutcome:
    pace = SearchTimes(offer_deadline_s=job.resources.offer_deadline_s)
    allocator = Allocator((ask,), pace)
    (published,) = (one for one in allocator.handle(Want(ask.kind, 1), 0.0) if isinstance(one, Advertise))
    offered, _ = offered_by(worker, machine)
    arbiter = Arbiter(
        WorkerCapacity(
            offered,
            [ExecutorDescriptor(kind=one.kind, name=one.name) for one in worker.executors],
            () if machine is None else memory_of_each(machine.gpus, offered.gpu),
            abilities,
        ),
        worker.offer,
        lambda: _WORKER,
    )
    request = published.request(_SCHEDULER)
    decided = [
        *arbiter.handle(RequestReceived(_SCHEDULER.peer, request), 0.0),
        *arbiter.handle(Tick(), min(worker.offer.request_window_s, request.offer_within_s / 2)),
    ]
    for one in decided:
        if isinstance(one, Ignored):
            return OfferOutcome(ask, _term(one.cause), one.reason)
        if isinstance(one, SendOffer):
            return _considered(allocator, ask, one.offer)
    return OfferOutcome(ask, "other", "it makes no offer")


def _considered(allocator: Allocator, ask: Search, offer: WorkerOffer) -> OfferOutcome:
    for one in allocator.handle(Offered(_WORKER.peer, offer), 0.1):
        if isinstance(one, Decline):
            reason = one.reason
            if one.cause == "price":
                reason = f"its price is {offer.price:g}, and the job pays {ask.max_price:g} at most"
            return OfferOutcome(ask, _term(one.cause), reason, "scheduler")
    return OfferOutcome(ask)


def _term(cause: str) -> Term:
    return cause if cause in ("executor", "features", "resources", "price") else "other"  # type: ignore[return-value]


def judge_offers(
    worker: WorkerConfig, job: JobConfig, machine: DetectedMachine | None = None, abilities: Abilities = OURS
) -> Iterator[Finding]:
    """Which term fails, for both classes of executors; a worker need not be good for both."""
    outcomes = try_offers(worker, job, machine, abilities)
    good = any(one.term is None or one.once_raised for one in outcomes)
    for outcome in outcomes:
        if outcome.term is None:
            continue
        severity: Severity = "error"
        if good:
            severity = "note" if outcome.term == "executor" or outcome.once_raised else "warning"
        yield _finding(worker, job, outcome, severity, offered_by(worker, machine)[0])
    deadline_s = job.resources.offer_deadline_s
    if good and worker.offer.temporary_lease_s < deadline_s + _JOURNEYS_S:
        yield checks.LEASE_SHORT.found(
            f"offer.temporary_lease_s is {worker.offer.temporary_lease_s:g} s, and the job collects offers "
            f"for {deadline_s:g} s before it takes one",
            f"set offer.temporary_lease_s to at least {deadline_s + 4 * _JOURNEYS_S:g} (the default is 5)",
        )


def _finding(
    worker: WorkerConfig, job: JobConfig, outcome: OfferOutcome, severity: Severity, offered: Resources
) -> Finding:
    ask, kind = outcome.ask, outcome.ask.kind
    term, role = outcome.term or "other", _ROLES[outcome.ask.kind]
    what = f"this worker would not {_WORDS[kind]} for {job.name!r}: {outcome.reason}"
    mend = None
    if term == "resources":
        short = list(_short(ask.resources, offered))
        if short:
            what += f" ({'; '.join(words for _, words in short)})"
            names = " and ".join(name for name, _ in short)
            mend = f"raise {names} in the worker's [resources], or lower it in scheduler.job.resources.{role}"
    elif term == "price":
        bid, price = ask.bid, f"scheduler.job.resources.{role}_price"
        if outcome.by == "worker":
            what += f" and the job bids {bid:g}"
            mend = f"lower offer.floor to {bid:g}, or raise {price}.bid to {worker.offer.floor:g}"
            if bid >= worker.offer.floor:
                mend = f"lower offer.price to {bid:g}, set offer.counter = true, or raise {price}.bid"
            if outcome.once_raised:
                what += f"; it will, once the job has raised its bid towards {ask.max_price:g}"
        else:
            mend = f"lower offer.price to {ask.max_price:g}, or raise {price}.max to {worker.offer.price:g}"
    elif term == "executor":
        mend = (
            f'add an [[executors]] entry with class = "{kind}" and name = "{ask.executor.name}", or correct '
            f"scheduler.job.resources.{role}_executor"
        )
    return _CHECKS[term].found(what, mend, severity)


def _short(asked: Resources, offered: Resources) -> Iterator[tuple[str, str]]:
    for name in ("cpu", "memory", "gpu", "storage"):
        wanted, there = getattr(asked, name), getattr(offered, name)
        if wanted > there + TOLERANCE:
            yield name, f"{name}: {wanted:g} is asked for, {there:g} offered"

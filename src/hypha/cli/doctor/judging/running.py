"""A node that runs, by what it reports of itself."""

from __future__ import annotations

from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Finding
from hypha.cli.doctor.gathered import Running

#: of all worker seconds
MUCH = 0.2
#: as the alert HighLeaseRenewalFailures
FAILING = 0.1
SLOW_FETCH_S = 60.0
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


def judge_running(observed: Running) -> Iterator[Finding]:
    """All of it."""
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
    elif observed.mean_fetch_s is not None and observed.mean_fetch_s > SLOW_FETCH_S:
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

"""A scheduler of a market: its allocator, the leases that it holds and renews, one job after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from tests.market.market import AGGREGATE, TRAIN, Market, checked_journal

from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources, WorkerOffer
from hypha.rules.leases import Denied, Granted, Release, Tick
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import (
    Accept,
    Advertise,
    AllocatorAction,
    AllocatorEvent,
    Begun,
    Contended,
    Dismiss,
    Gained,
    GiveBack,
    LeaseFailed,
    Search,
    SearchTimes,
    Want,
)
from hypha.scheduler.leasing.renewal import (
    Attempt,
    Lapsed,
    Renewal,
    RenewalEvent,
    RenewalFailed,
    RenewalRefused,
    Renewed,
)
from hypha.worker.leasing.events import RenewAsked, RequestReceived


@dataclass
class MarketJob:
    """``wanted`` workers with ``need`` each, and a parameter server where ``server`` says what that needs. It
    begins with ``least`` of them, and lasts ``lasts_s``.
    """

    wanted: int
    need: Resources
    least: int
    lasts_s: float
    server: Resources | None = None
    dataset: str | None = None
    begun_at: float | None = None


@dataclass
class _Renewing:
    kind: ExecutorClass
    offer: WorkerOffer
    renewal: Renewal
    gained: bool = False
    contention: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Purse:
    bid: float
    maximum: float
    raise_after_s: float | None = None
    raise_by: float = 0.25


@dataclass
class MarketScheduler:
    """A scheduler with an allocator, which works for one job after the other."""

    market: Market
    name: str
    purse: Purse
    pace: SearchTimes = field(default_factory=SearchTimes)
    alive: bool = True
    #: lease -> offer, of those that were confirmed
    held: dict[str, WorkerOffer] = field(default_factory=dict)
    job: MarketJob | None = None
    jobs: int = 0
    #: called with each job that has ended
    on_end: Callable[[MarketJob], None] = lambda _: None
    #: how often leases were given back to make way
    gave_way: int = 0

    def __post_init__(self) -> None:
        self.market.schedulers[self.name] = self
        self._renewing: dict[str, _Renewing] = {}
        self.allocator = Allocator([])
        self._wake_at: float | None = None

    def work_for(self, job: MarketJob) -> None:
        """Look for its workers, keep them, and give them back when it is over."""
        self.job = job
        self.jobs += 1
        asks = [self._ask(TRAIN, job.need, job.least, job.dataset)]
        if job.server is not None:
            asks.append(self._ask(AGGREGATE, job.server, 1, None))
        self._open(asks)
        if job.server is not None:
            self.tell(Want("aggregate", 1))
        self.tell(Want("train", job.wanted))

    def _ask(self, executor: ExecutorDescriptor, need: Resources, least: int, dataset: str | None) -> Search:
        purse = self.purse
        return Search(
            f"{self.name}/{self.jobs}/{executor.kind}",
            executor,
            need,
            purse.bid,
            purse.maximum,
            dataset,
            raise_after_s=purse.raise_after_s,
            raise_by=purse.raise_by,
            least=least,
        )

    def _open(self, asks: Iterable[Search]) -> None:
        self.allocator = Allocator(asks, self.pace, checked_journal())
        self._wake_at = None

    def die(self) -> None:
        """At once: whatever it holds ends by itself, and its job is over."""
        self.alive, self.job = False, None
        self.held.clear()
        self._renewing.clear()
        self._open([])

    def tell(self, event: AllocatorEvent) -> list[AllocatorAction]:
        if not self.alive:
            return []
        actions = self.allocator.handle(event, self.market.now)
        for action in actions:
            match action:
                case Advertise():
                    self._publish(action)
                case Accept(kind, offer, expires_at):
                    now = self.market.now
                    renewal = Renewal(expires_at - now, now, self.market.random, journal=checked_journal())
                    self._renewing[offer.lease_id] = _Renewing(kind, offer, renewal)
                    self._renew(offer.lease_id, Tick())
                case Dismiss(lease_id, worker):
                    self._release(worker.peer, lease_id)
                case GiveBack(lease_id):
                    self.gave_way += 1
                    self.drop(lease_id)
                case _:
                    pass
        self._sleep()
        return actions

    def _publish(self, action: Advertise) -> None:
        request = action.request(PeerRef(peer=self.name))
        for worker in self.market.workers.values():
            cached = request.dataset is not None and request.dataset in worker.datasets
            self.market.travel(partial(worker.tell, RequestReceived(self.name, request, cached=cached)))

    def _sleep(self) -> None:
        wake = self.allocator.next_wake
        if wake is not None and (self._wake_at is None or wake < self._wake_at):
            self._wake_at = wake
            self.market.at(wake, partial(self._woken, self.allocator, wake))

    def _woken(self, allocator: Allocator, at: float) -> None:
        if allocator is not self.allocator or self._wake_at != at:
            return
        self._wake_at = None
        wake = allocator.next_wake
        if wake is not None and wake <= self.market.now:
            self.tell(Tick())
        self._sleep()

    # --- leases ---------------------------------------------------------------------------------------

    def drop(self, lease_id: str, avoid: bool = False) -> None:
        renewing = self._renewing.pop(lease_id, None)
        self.held.pop(lease_id, None)
        if renewing is not None:
            self.tell(LeaseFailed(lease_id, avoid))
            self._release(renewing.offer.worker.peer, lease_id)

    def end(self) -> None:
        """The job is over: give everything back."""
        job, self.job = self.job, None
        for kind in self.allocator.kinds:
            self.tell(Want(kind, 0))
        for lease_id in list(self._renewing):
            self.drop(lease_id)
        assert not self.held, f"{self.name} still holds {list(self.held)}"
        self._open([])
        if job is not None:
            self.on_end(job)

    def _release(self, worker: str, lease_id: str) -> None:
        self.market.travel(lambda: self.market.workers[worker].tell(Release(lease_id, self.name)))

    def _renew(self, lease_id: str, event: RenewalEvent) -> None:
        renewing = self._renewing.get(lease_id)
        if renewing is None or not self.alive:
            return
        if isinstance(event, Renewed) and not renewing.gained:
            renewing.gained = True
            self.held[lease_id] = renewing.offer
            self.tell(Gained(lease_id))
            self._begin()
        for action in renewing.renewal.handle(event, self.market.now):
            if isinstance(action, Attempt):
                self._attempt(lease_id, renewing, action.timeout_s)
            elif isinstance(action, Lapsed):
                self._renewing.pop(lease_id, None)
                self.held.pop(lease_id, None)
                self.tell(LeaseFailed(lease_id, avoid=not action.refused))
                if not action.refused:
                    self._release(renewing.offer.worker.peer, lease_id)
                return
        wake = renewing.renewal.next_wake
        if wake < float("inf"):
            self.market.at(wake, partial(self._renewal_due, lease_id, renewing))

    def _renewal_due(self, lease_id: str, renewing: _Renewing) -> None:
        if self._renewing.get(lease_id) is renewing and renewing.renewal.next_wake <= self.market.now:
            self._renew(lease_id, Tick())

    def _attempt(self, lease_id: str, renewing: _Renewing, timeout_s: float) -> None:
        answered = False
        worker = self.market.workers[renewing.offer.worker.peer]

        def answer(event: RenewalEvent, contention: tuple[bool, bool] = (False, False)) -> None:
            nonlocal answered
            if answered or self._renewing.get(lease_id) is not renewing:
                return
            answered = True
            if isinstance(event, Renewed) and contention != renewing.contention:
                renewing.contention = contention
                self.tell(Contended(lease_id, *contention))
            self._renew(lease_id, event)

        def arrive() -> None:
            for action in worker.tell(RenewAsked(lease_id, self.name)):
                if isinstance(action, Granted):
                    left_s = action.lease.expires_at - self.market.now
                    contention = worker.arbiter.ageing.contention(action.lease, self.market.now)
                    self.market.travel(partial(answer, Renewed(left_s), contention))
                elif isinstance(action, Denied):
                    self.market.travel(partial(answer, RenewalRefused(action.code, action.reason)))

        self.market.travel(arrive)
        self.market.at(self.market.now + timeout_s, partial(answer, RenewalFailed("no answer")))

    def _begin(self) -> None:
        """The job begins once it has what it needs, and ends by itself."""
        job = self.job
        if job is None or job.begun_at is not None:
            return
        kinds = [renewing.kind for renewing in self._renewing.values() if renewing.gained]
        if kinds.count("train") < job.least or (job.server is not None and "aggregate" not in kinds):
            return
        job.begun_at = self.market.now
        self.tell(Begun())
        self.market.at(self.market.now + job.lasts_s, partial(self._over, job))

    def _over(self, job: MarketJob) -> None:
        if self.alive and self.job is job:
            self.end()

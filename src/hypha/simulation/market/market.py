"""A market of workers and schedulers in memory: their real decisions, no network, no processes, no trio.

Arbiters, allocators and renewals are what the programs run; here messages between them take a random while,
and some are lost. One heap holds what happens when, so a run is decided by its seed, and thousands of them
take minutes: for rules that must hold in every interleaving. What must hold is asserted while a market runs.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from hypha.config.models import OfferConfig
from hypha.journal import Journal
from hypha.leases import Denied, Granted, Release, Tick
from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources, WorkerOffer
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import (
    Accept,
    Advertise,
    AllocatorAction,
    AllocatorEvent,
    Begun,
    Contended,
    Decline,
    Dismiss,
    Gained,
    GiveBack,
    LeaseFailed,
    Offered,
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
from hypha.worker.leasing.arbiter import (
    Arbiter,
    ArbiterAction,
    ArbiterEvent,
    OfferFailed,
    RenewAsked,
    RequestHeard,
    SendOffer,
)

TRAIN = ExecutorDescriptor(kind="train", name="t")
AGGREGATE = ExecutorDescriptor(kind="aggregate", name="a")


def _checked() -> Journal:
    """Machines that have it assert what must hold after every event."""
    return Journal(kept=1, checked=True)


class Market:
    """``loss`` is the chance that a message is lost; one takes ``delay_s`` on average."""

    def __init__(self, seed: int | str, loss: float = 0.0, delay_s: float = 0.05) -> None:
        self.random = Random(seed)
        self.loss = loss
        self.delay_s = delay_s
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self.workers: dict[str, MarketWorker] = {}
        self.schedulers: dict[str, MarketScheduler] = {}

    def at(self, when: float, what: Callable[[], object]) -> None:
        """``what`` happens then, or now where that is over."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), what))

    def travel(self, what: Callable[[], object]) -> None:
        """A message goes one way, and ``what`` happens where it arrives, if it does."""
        if self.random.random() >= self.loss:
            self.at(self.now + self.random.uniform(0.2, 1.8) * self.delay_s, what)

    def run(self, until: float) -> None:
        """Whatever happens up to ``until``."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, what = heapq.heappop(self._heap)
            self.events += 1
            what()
        self.now = max(self.now, until)

    def check(self) -> None:
        """Assert that nothing is booked twice: whatever a scheduler believes to hold, its worker holds for
        it alone, at a price that both agreed to. Books assert that they hold no more than there is.
        """
        owners: dict[str, str] = {}
        for scheduler in self.schedulers.values():
            for lease_id, offer in scheduler.held.items():
                assert lease_id not in owners, (
                    f"{lease_id} is held by {owners[lease_id]} and {scheduler.name}"
                )
                owners[lease_id] = scheduler.name
                worker = self.workers[offer.worker.peer]
                if not worker.alive or lease_id.rpartition("/")[0] != worker.life:
                    continue
                lease = worker.arbiter.book.get(lease_id)
                assert lease is not None, f"{scheduler.name} believes in {lease_id}, which has ended"
                assert (lease.scheduler, lease.accepted) == (scheduler.name, True), f"{lease_id} is another's"
                assert worker.terms.floor <= lease.price == offer.price <= scheduler.purse.maximum, (
                    f"{lease_id} of {worker.name} is sold to {scheduler.name} at {lease.price}"
                )


class MarketWorker:
    """A worker with an arbiter, which may die and come back with nothing."""

    def __init__(self, market: Market, name: str, total: Resources, terms: OfferConfig) -> None:
        self.market, self.name, self.total, self.terms = market, name, total, terms
        self.alive = False
        self.lives = 0
        self._wake_at: float | None = None
        #: names of datasets of which it has slices
        self.datasets: set[str] = set()
        market.workers[name] = self
        self.start()

    def start(self) -> None:
        """From nothing."""
        if self.alive:
            return
        self.alive = True
        self.lives += 1
        self.life = f"{self.name}.{self.lives}"
        numbers = itertools.count()
        self.arbiter = Arbiter(
            self.total,
            [TRAIN, AGGREGATE],
            self.terms,
            lambda: PeerRef(peer=self.name),
            lambda: f"{self.life}/{next(numbers)}",
            _checked(),
        )
        self._wake_at = None

    def die(self) -> None:
        """At once: nobody is told."""
        self.alive = False

    def tell(self, event: ArbiterEvent) -> list[ArbiterAction]:
        """Its arbiter; offers are sent."""
        if not self.alive:
            return []
        actions = self.arbiter.handle(event, self.market.now)
        for action in actions:
            if isinstance(action, SendOffer):
                self._send(action)
        self._sleep()
        return actions

    def _sleep(self) -> None:
        wake = self.arbiter.next_wake
        if wake is not None and (self._wake_at is None or wake < self._wake_at):
            self._wake_at = wake
            self.market.at(wake, partial(self._woken, self.arbiter, wake))

    def _woken(self, arbiter: Arbiter, at: float) -> None:
        if not self.alive or arbiter is not self.arbiter or self._wake_at != at:
            return
        self._wake_at = None
        wake = arbiter.next_wake
        if wake is not None and wake <= self.market.now:
            self.tell(Tick())
        self._sleep()

    def _send(self, action: SendOffer) -> None:
        scheduler, lease_id, life = (
            self.market.schedulers[action.scheduler.peer],
            action.offer.lease_id,
            self.life,
        )
        answered = False

        def failed(undelivered: bool) -> None:
            nonlocal answered
            if not answered and self.life == life:
                answered = True
                self.tell(OfferFailed(lease_id, "", undelivered=undelivered))

        def taken() -> None:
            nonlocal answered
            answered = True

        def arrive() -> None:
            if not scheduler.alive:
                return
            declined = any(
                isinstance(answer, Decline) and answer.lease_id == lease_id
                for answer in scheduler.tell(Offered(self.name, action.offer))
            )
            self.market.travel(partial(failed, False) if declined else taken)

        self.market.travel(arrive)
        # no answer for as long as the lease behind it lives
        self.market.at(self.market.now + action.offer.expires_in_s, partial(failed, True))


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
    ended_at: float | None = None


@dataclass
class _Renewing:
    kind: ExecutorClass
    offer: WorkerOffer
    renewal: Renewal
    gained: bool = False
    contention: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Purse:
    """What a scheduler pays."""

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
        self.allocator = Allocator(asks, self.pace, _checked())
        self._wake_at = None

    def die(self) -> None:
        """At once: whatever it holds ends by itself, and its job is over."""
        self.alive, self.job = False, None
        self.held.clear()
        self._renewing.clear()
        self._open([])

    def tell(self, event: AllocatorEvent) -> list[AllocatorAction]:
        """Its allocator; what follows is done."""
        if not self.alive:
            return []
        actions = self.allocator.handle(event, self.market.now)
        for action in actions:
            match action:
                case Advertise():
                    self._publish(action)
                case Accept(kind, offer, expires_at):
                    now = self.market.now
                    renewal = Renewal(expires_at - now, now, self.market.random, journal=_checked())
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
            self.market.travel(partial(worker.tell, RequestHeard(self.name, request, cached=cached)))

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
        """Give it back."""
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
            job.ended_at = self.market.now
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
                    contention = worker.arbiter.contention(action.lease, self.market.now)
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

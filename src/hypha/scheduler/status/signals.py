"""The metrics of a job: counted from what its machines note in the journal, and read from what it is now.

:meth:`JobMetrics.note` listens to the journal, so that no machine knows of metrics; :meth:`JobMetrics.shown`
puts up what is looked at about once a second. Offers are counted by what became of them, with the machine's
own cause: that is why a job waits for workers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import trio

from hypha.journal import JournalEntry
from hypha.messages import ExecutorClass, LedgerRound, ModelReady, SendModel
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.data.slices import Assignment
from hypha.scheduler.leasing import allocator, renewal
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds import machine as rounds
from hypha.scheduler.rounds.events import AnswerSlice, Record, Send, SliceAsked, Told
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.participants import Member
from hypha.scheduler.status.snapshot import JobSnapshot, Progressed
from hypha.telemetry import instruments as metrics
from hypha.telemetry.metrics import OTHER, Reading, Source

KINDS: tuple[ExecutorClass, ...] = ("train", "aggregate")
#: what the round machine counts besides messages
_NO_MESSAGES = frozenset({"foreign slices", "lost samples"})


class JobMetrics:
    """Of one run of a job that ``began`` then, of trio's clock, and is to have ``rounds_wanted`` rounds.
    ``machine`` and ``dataset`` give the present ones, None before there is one.
    """

    def __init__(
        self,
        pool: Pool,
        progressed: Progressed,
        rounds_wanted: int,
        began: float,
        machine: Callable[[], RoundMachine | None],
        dataset: Callable[[], ServedDataset | None],
    ) -> None:
        self._pool = pool
        self._progressed = progressed
        self._rounds_wanted = rounds_wanted
        self._began = began
        self._applied_at = began
        self._machine = machine
        self._dataset = dataset
        self._kinds: dict[str, ExecutorClass] = {}
        #: leases: of which kind they are, and how far they have come
        self._leases: dict[str, tuple[str, Literal["offered", "accepted", "held"]]] = {}
        #: why a held lease lapsed, until the allocator handles it
        self._lapsed: dict[str, str] = {}
        self._attempted: dict[str, float] = {}
        self._wanted: dict[str, int] = {}
        self._short_since: dict[str, float] = {}
        #: the newest request of each worker for a slice
        self._asked: dict[str, tuple[str, int]] = {}
        self._theta_bytes = self._sent_thetas = self._round_thetas = 0
        self._refused: tuple[RoundMachine | None, Counter[str]] = (None, Counter())

    def note(self, entry: JournalEntry) -> None:
        if entry.machine == rounds.NAME:
            self._round_machine(entry)
        elif entry.machine == allocator.NAME:
            self._allocator(entry)
        elif entry.machine.startswith(f"{renewal.NAME}:"):
            self._renewal(entry.machine.partition(":")[2], entry)

    def ended(self, status: str, now: float) -> None:
        """The run is over: ``done``, ``failed`` or ``stopped``."""
        self._count_refused()
        metrics.JOB_DURATION.record(now - self._began, status=status)

    def _allocator(self, entry: JournalEntry) -> None:
        kind: str = OTHER
        match entry.event:
            case allocation.AllocatorBegan(asks):
                self._kinds = {ask.request_id: ask.kind for ask in asks}
            case allocation.Offered(_, offer):
                kind = self._kinds.get(offer.request_id, OTHER)
            case allocation.Adopted(adopted, lease_id, _):
                self._leases[lease_id] = adopted, "held"
            case allocation.Gained(lease_id):
                gained, stage = self._leases.get(lease_id, (OTHER, "held"))
                if stage == "accepted":
                    self._leases[lease_id] = gained, "held"
                    metrics.OFFERS_RECEIVED.add(kind=gained, outcome="accepted")
            case allocation.LeaseFailed(lease_id):
                self._lost(lease_id)
        for action in entry.actions:
            match action:
                case allocation.Keep(lease_id):
                    self._leases.setdefault(lease_id, (kind, "offered"))
                case allocation.Decline(_, _, _, cause):
                    metrics.OFFERS_RECEIVED.add(kind=kind, outcome=cause)
                case allocation.Dismiss(lease_id, _, cause):
                    offered, _ = self._leases.pop(lease_id, (OTHER, ""))
                    metrics.OFFERS_RECEIVED.add(kind=offered, outcome=cause)
                case allocation.Accept(accepted, offer, _):
                    self._leases[offer.lease_id] = accepted, "accepted"
        self._look_for_missing(entry)

    def _lost(self, lease_id: str) -> None:
        self._attempted.pop(lease_id, None)
        lapsed = self._lapsed.pop(lease_id, "dropped")
        kind, stage = self._leases.pop(lease_id, (OTHER, ""))
        if stage == "accepted":
            metrics.OFFERS_RECEIVED.add(kind=kind, outcome="lost")
        elif stage == "held":
            metrics.LEASES_LOST.add(kind=kind, reason=lapsed)

    def _look_for_missing(self, entry: JournalEntry) -> None:
        if not isinstance(entry.state, Mapping):
            return
        for kind, summary in entry.state.items():
            if not isinstance(summary, Mapping):
                continue
            self._wanted[kind] = summary["wanted"]
            if summary["confirmed"] < summary["wanted"]:
                self._short_since.setdefault(kind, entry.at_s)
            else:
                self._short_since.pop(kind, None)

    def _renewal(self, lease_id: str, entry: JournalEntry) -> None:
        match entry.event:
            case renewal.Renewed():
                self._attempt_ended(lease_id, entry.at_s, "success")
            case renewal.RenewalFailed() | renewal.RenewalRefused():
                self._attempt_ended(lease_id, entry.at_s, "failure")
        for action in entry.actions:
            match action:
                case renewal.Attempt():
                    self._attempted[lease_id] = entry.at_s
                case renewal.Lapsed(_, _, cause):
                    self._lapsed[lease_id] = cause

    def _attempt_ended(self, lease_id: str, now: float, status: str) -> None:
        metrics.RENEWALS.add(status=status)
        if (began := self._attempted.pop(lease_id, None)) is not None:
            metrics.RENEWAL_DURATION.record(now - began, status=status)

    def _round_machine(self, entry: JournalEntry) -> None:
        if isinstance(entry.event, Told) and isinstance(entry.event.event, ModelReady):
            self._theta_bytes = entry.event.event.size_bytes
        for action in entry.actions:
            match action:
                case AnswerSlice(slice=Assignment() as given) if isinstance(entry.event, SliceAsked):
                    self._slice(entry.event, given)
                case Send(directive=SendModel()):
                    self._sent_thetas += 1
                case Record(entry=applied):
                    # theta of the round went to those who got it on request, and that of the next goes to
                    # all members
                    members = int(str(entry.state["members"])) if isinstance(entry.state, Mapping) else 0
                    self._round_thetas, self._sent_thetas = members + self._sent_thetas, 0
                    self._applied_at = entry.at_s
                    metrics.JOB_SAMPLES.add(applied.samples)
                    metrics.SYNCHRONIZATIONS.add()
                    metrics.ROUND_DURATION.record(applied.duration_s)

    def _slice(self, asked: SliceAsked, given: Assignment) -> None:
        request = asked.request
        newest = self._asked.get(asked.caller)
        if newest is not None and newest[0] == request.incarnation and request.seq <= newest[1]:
            source = "repeated"
        else:
            self._asked[asked.caller] = (request.incarnation, request.seq)
            source = "cached" if given.index in request.cached else "fresh"
        metrics.SLICES_ASSIGNED.add(source=source)

    def _count_refused(self) -> None:
        """The machine only counts; what it counted since the last look is added."""
        known, counted = self._refused
        machine = self._machine()
        if machine is None:
            return
        if known is not machine:
            counted = Counter()
        for what, count in machine.counts.items():
            if count > counted[what] and what not in _NO_MESSAGES:
                metrics.MESSAGES_REFUSED.add(count - counted[what], reason=what)
        self._refused = (machine, Counter(machine.counts))

    @contextlib.contextmanager
    def shown(self, snapshot: Callable[[], JobSnapshot]) -> Iterator[None]:
        """The gauges show this run meanwhile, of which ``snapshot()`` is the present one; its counters begin
        at 0.
        """
        for counter in (
            metrics.RENEWALS,
            metrics.LEASES_LOST,
            metrics.OFFERS_RECEIVED,
            metrics.FAILURES,
            metrics.SYNCHRONIZATIONS,
            metrics.JOB_SAMPLES,
        ):
            counter.begin()
        with contextlib.ExitStack() as stack:
            for gauge, source in (
                (metrics.ACTIVE_WORKERS, lambda: float(self._held("train"))),
                (metrics.LEASES, lambda: _by("kind", {kind: self._held(kind) for kind in KINDS})),
                (metrics.LEASES_WANTED, lambda: _by("kind", self._wanted)),
                (metrics.PRICES, self._prices),
                (metrics.ALLOCATION_WAIT, self._waits),
                (metrics.SLICES, self._slices),
                (metrics.EPOCH, self._of_machine(lambda machine: machine.tracker.epoch)),
                (metrics.PROVIDERS, self._providers),
                (metrics.ROUND, self._of_machine(lambda machine: machine.round)),
                (metrics.ROUNDS, lambda: float(self._rounds_wanted)),
                (metrics.ROUND_AGE, lambda: trio.current_time() - self._applied_at),
                (metrics.BATCH_TIME, self._of_members(lambda member: member.batch_time.value_s)),
                (metrics.IDLE, self._of_members(lambda member: member.idle_share)),
                (metrics.CHECKPOINT_ROUND, lambda: _only(self._progressed.checkpoint)),
                (metrics.CHECKPOINT_AGE, self._checkpoint_age),
                (metrics.JOB_STATE, lambda: _states(snapshot())),
                (metrics.GOODPUT, lambda: _goodput(snapshot())),
                (metrics.LOSS, lambda: _only(self._progressed.loss)),
                (
                    metrics.WORKER_LOSS,
                    self._of_newest(lambda entry: {one.worker: one.loss for one in entry.contributors}),
                ),
                (
                    metrics.UPDATE_NORM,
                    self._of_newest(lambda entry: {one.worker: one.norm for one in entry.updates}),
                ),
                (
                    metrics.UPDATE_COSINE,
                    self._of_newest(lambda entry: {one.worker: one.cosine for one in entry.updates}),
                ),
                (metrics.ROUND_BYTES, self._round_bytes),
            ):
                stack.enter_context(gauge.watch(source))
            yield

    def _held(self, kind: ExecutorClass) -> int:
        return sum(lease.kind == kind for lease in self._pool.leases)

    def _prices(self) -> Iterable[Reading]:
        for kind in KINDS:
            yield {"kind": kind, "of": "bid"}, self._pool.bid(kind)
            paid = sum(lease.price for lease in self._pool.leases if lease.kind == kind)
            yield {"kind": kind, "of": "leases"}, paid

    def _waits(self) -> Iterable[Reading]:
        now = trio.current_time()
        return _by("kind", {kind: max(0.0, now - since) for kind, since in self._short_since.items()})

    def _slices(self) -> Iterable[Reading]:
        self._count_refused()
        machine = self._machine()
        return _by("state", machine.tracker.counts() if machine is not None else {})

    def _of_machine(self, value: Callable[[RoundMachine], float]) -> Source:
        def read() -> Iterable[Reading]:
            machine = self._machine()
            return _only(None if machine is None else value(machine))

        return read

    def _of_members(self, value: Callable[[Member], float | None]) -> Source:
        def read() -> Iterable[Reading]:
            machine = self._machine()
            members = machine.members.values() if machine is not None else ()
            return _by("worker", {member.peer: value(member) for member in members})

        return read

    def _of_newest(self, values: Callable[[LedgerRound], Mapping[str, float | None]]) -> Source:
        """By worker, of those whose update is in the newest round: others could be named without end."""

        def read() -> Iterable[Reading]:
            newest = self._progressed.newest
            if newest is None:
                return []
            found, inside = values(newest), {part.worker for part in newest.contributors}
            return _by("worker", {peer: found[peer] for peer in found.keys() & inside})

        return read

    def _round_bytes(self) -> Iterable[Reading]:
        newest = self._progressed.newest
        if newest is None:
            return []
        updates = float(sum(one.size_bytes for one in newest.updates))
        return _by("kind", {"update": updates, "theta": float(self._round_thetas * self._theta_bytes)})

    def _providers(self) -> Iterable[Reading]:
        dataset = self._dataset()
        return _only(len(dataset.providers) if dataset is not None else None)

    def _checkpoint_age(self) -> Iterable[Reading]:
        saved_at = self._progressed.checkpoint_at
        return _only(None if saved_at is None else trio.current_time() - saved_at)


def _only(value: float | None) -> Iterable[Reading]:
    """One value without labels, where there is one."""
    return [] if value is None else [({}, value)]


def _by(label: str, values: Mapping[str, float | None]) -> Iterable[Reading]:
    return [({label: one}, value) for one, value in values.items() if value is not None]


def _states(snapshot: JobSnapshot) -> Iterable[Reading]:
    return _by("state", {one: float(one == snapshot.state) for one in metrics.JOB_STATES})


def _goodput(snapshot: JobSnapshot) -> Iterable[Reading]:
    return _only(None if snapshot.goodput is None else snapshot.goodput.samples_per_s)

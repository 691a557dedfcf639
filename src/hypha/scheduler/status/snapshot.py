"""What a job has achieved so far, and what a user sees of it in the terminal, under ``/status``, on the live
page and in the demo.

:class:`JobSnapshot` is the contract: it is what ``/status`` answers, and the ``job`` of every message that
the live page receives (:class:`hypha.scheduler.status.round_record.Now`). Fields are only ever added, each
with a default, so that an older reader still reads a newer scheduler. A ``name`` is that of the certificate
of the peer beside it, empty where it is not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from hypha.messages import ExecutorClass, LedgerRound, UpdateStatistics
from hypha.scheduler.goodput.report import GoodputReport

JobState = Literal["allocating", "loading", "training", "paused", "exporting", "done", "failed"]


class WorkerSnapshot(Struct, frozen=True):
    """A training worker; ``batches`` of ``planned`` in the open round. ``update_norm`` is the L2 norm of its
    update in the last round and ``update_cosine`` that update's cosine to the mean of all, where known.
    ``version`` is Hypha's there, where the worker states it; ``idle_share`` the share of its rounds, 0 to 1,
    in which it waits for the others and for theta, once that is known.
    """

    peer: str
    state: str
    batches: int = 0
    planned: int | None = None
    batch_size: int = 0
    samples_per_s: float = 0.0
    samples: int = 0
    loss: float | None = None
    lease: str = ""
    update_norm: float | None = None
    update_cosine: float | None = None
    version: str = ""
    name: str = ""
    idle_share: float | None = None


class LeaseSnapshot(Struct, frozen=True):
    """A lease that the job holds: what it reserves (GB, and cores), for which price, and for how long yet.
    ``suspected``: its worker cannot be reached.
    """

    lease: str
    peer: str
    kind: ExecutorClass
    price: float = 0.0
    cpu: float = 0.0
    memory: float = 0.0
    gpu: float = 0.0
    storage: float = 0.0
    expires_in_s: float = 0.0
    suspected: bool = False
    version: str = ""
    name: str = ""
    #: when its worker ends, where it has announced that
    leaves_in_s: float | None = None


class ServiceSnapshot(Struct, frozen=True):
    """A gateway or a data node that the job uses, and what it states of its version; empty: it is older than
    that.
    """

    kind: str
    peer: str
    name: str = ""
    version: str = ""
    features: tuple[str, ...] = ()


class SliceCounts(Struct, frozen=True):
    """The slices of the oldest epoch that is not complete, by state; together they are the whole dataset."""

    available: int = 0
    assigned: int = 0
    used: int = 0


class ConnectionSnapshot(Struct, frozen=True):
    """A connection of the scheduler. ``round_trip_s`` is None where nobody has measured it."""

    peer: str
    kind: str
    direction: str = ""
    address: str = ""
    roles: tuple[str, ...] = ()
    round_trip_s: float | None = None
    name: str = ""


class LogLine(Struct, frozen=True):
    """A warning or an error of the scheduler's log, without secrets. ``at`` is in seconds since 1970."""

    number: int
    at: float
    level: str
    logger: str
    message: str
    peer: str = ""
    name: str = ""


class JobSnapshot(Struct, frozen=True):
    """A job at a moment. ``message`` is the sentence a user needs; ``loss`` that of the last round;
    ``warnings`` are the log's last ones, the newest at the end. ``version`` is the scheduler's.
    """

    name: str
    job_id: str = ""
    state: JobState = "allocating"
    phase: str = ""
    message: str = ""
    generation: int = 0
    round: int = 0
    rounds: int = 0
    samples: int = 0
    samples_per_s: float = 0.0
    loss: float | None = None
    theta: str = ""
    workers: tuple[WorkerSnapshot, ...] = ()
    parameter_server: str | None = None
    dataset: str = ""
    dataset_samples: int = 0
    providers: int = 0
    epoch: int = 0
    leases: int = 0
    checkpoint: int | None = None
    output: str = ""
    elapsed_s: float = 0.0
    refused: dict[str, int] = {}
    goodput: GoodputReport | None = None
    scheduler: str = ""
    held: tuple[LeaseSnapshot, ...] = ()
    slices: SliceCounts | None = None
    connections: tuple[ConnectionSnapshot, ...] = ()
    warnings: tuple[LogLine, ...] = ()
    version: str = ""
    scheduler_name: str = ""
    parameter_server_name: str = ""
    services: tuple[ServiceSnapshot, ...] = ()


#: of the newest round in the mean throughput
_SHARE = 0.3


class Progressed:
    """What was achieved in rounds that count."""

    def __init__(self) -> None:
        self._entries: dict[int, LedgerRound] = {}
        self.samples_per_s = 0.0
        self.checkpoint: int | None = None
        #: when that one became durable, of trio's clock
        self.checkpoint_at: float | None = None

    @property
    def samples(self) -> int:
        return self.samples_from(0)

    def samples_from(self, first: int) -> int:
        """Of that round and later ones."""
        return sum(entry.samples for entry in self._entries.values() if entry.round >= first)

    @property
    def newest(self) -> LedgerRound | None:
        """The newest round."""
        return self._entries[max(self._entries)] if self._entries else None

    @property
    def loss(self) -> float | None:
        """Of the newest round."""
        return None if self.newest is None else self.newest.loss

    @property
    def updates(self) -> dict[str, UpdateStatistics]:
        """What was measured of the newest round's updates, by worker."""
        return {} if self.newest is None else {one.worker: one for one in self.newest.updates}

    def add(self, entry: LedgerRound) -> None:
        """A round was applied."""
        self._entries[entry.round] = entry
        if entry.duration_s > 0:
            rate = entry.samples / entry.duration_s
            mean = self.samples_per_s
            self.samples_per_s = rate if not mean else mean + _SHARE * (rate - mean)

    def resume(self, entries: Iterable[LedgerRound]) -> None:
        self._entries = {entry.round: entry for entry in entries if not entry.discarded}

    def cut(self, round_: int) -> None:
        """The job goes on from ``round_``: later ones do not count any more."""
        self._entries = {number: entry for number, entry in self._entries.items() if number < round_}

"""What the doctor looks at: plain values, that judges read and tests write.

``None`` stands for what is not known, or does not apply; judges find nothing in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from hypha.pki.identity import IdentityFiles
from hypha.worker.limits.detecting import DetectedMachine


@dataclass(frozen=True)
class Unknown:
    """That ``what`` could not be found out, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Directory:
    """A place where the node writes; ``key`` names it in the configuration. ``problem`` says why it cannot be
    written to, ``write_rate`` is in bytes a second, of a file that was synchronised.
    """

    key: str
    path: str
    free_bytes: int | None = None
    write_rate: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Accelerators:
    """The GPUs of this machine and what torch makes of them. ``driver`` is that of the kernel, ``built_for``
    the version of CUDA that torch was built for, empty for a torch without CUDA.
    """

    driver: str = ""
    torch: str = ""
    built_for: str = ""
    usable: int = 0
    problem: str = ""


@dataclass(frozen=True)
class MachineObservations:
    """The buffers are the largest that the kernel gives a TCP connection by itself, in bytes."""

    open_files: int | None = None
    receive_buffer: int | None = None
    send_buffer: int | None = None
    has: DetectedMachine | None = None
    #: what of the buffers in [tuning.sockets] the kernel does not give, in sentences
    buffer_shortfalls: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    directories: tuple[Directory, ...] = ()
    accelerators: Accelerators | None = None


@dataclass(frozen=True)
class IdentityObservations:
    """What the identity files hold. ``problems`` are those for which a node would not start, as (key,
    sentence); ``ends`` says when what ends, as of :meth:`hypha.pki.identity.Identity.expirations`, and of a
    certificate that cannot be used, too.
    """

    files: IdentityFiles
    now: datetime
    peer: str = ""
    roles: frozenset[str] | None = None
    key_mode: int | None = None
    begins: datetime | None = None
    ends: dict[str, datetime] = field(default_factory=dict)
    problems: tuple[tuple[str, str], ...] = ()


#: ``own``: this very node has it; ``other``: another process; ``foreign``: no address of this machine
PortState = Literal["free", "own", "other", "foreign"]


@dataclass(frozen=True)
class Port:
    """A port to listen on, ``why`` it cannot be had."""

    key: str
    address: str
    state: PortState
    why: str = ""


#: why nobody could be asked at an address
Failure = Literal["name", "unreachable", "other", "trust"]


@dataclass(frozen=True)
class Contact:
    """A gateway or a peer, as it was found at ``address``, or by its PeerID. ``failure`` and ``reason`` say
    why it could not be asked. ``round_trips_s`` are those of a row of small requests, infinite where no
    answer came; ``late_s`` is by how much this process itself was late meanwhile. ``clock_s`` is the peer's
    time less ours, give or take half of a round trip. ``up`` and ``down`` are bytes a second; ``stalled``: a
    large request got no answer though small ones did. ``seen_at`` are the ends of this node's connections as
    that one sees them, the doctor's own at the end. ``mtu`` is that of the path, in bytes.
    """

    address: str
    name: str = ""
    peer: str = ""
    component: str = ""
    roles: frozenset[str] = frozenset()
    relayed: bool = False
    failure: Failure | None = None
    reason: str = ""
    healthy: bool = True
    details: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)
    seen_at: tuple[str, ...] = ()
    clock_s: float | None = None
    round_trips_s: tuple[float, ...] = ()
    late_s: float = 0.0
    mtu: int | None = None
    up: float | None = None
    down: float | None = None
    stalled: bool = False

    @property
    def called(self) -> str:
        return self.name or self.address

    @property
    def round_trip_s(self) -> float | None:
        """The quickest; None without an answer."""
        return min((one for one in self.round_trips_s if math.isfinite(one)), default=None)


@dataclass(frozen=True)
class Dialled:
    """What came of dialling one of this node's ``address``es, by a gateway (``by``) or, with none, from
    here. ``reason`` is empty where this node answered; ``tried`` is false where it could not be tried.
    ``external``: somebody has set it as one of external_addresses.
    """

    address: str
    by: str = ""
    reason: str = ""
    tried: bool = True
    external: bool = False


@dataclass(frozen=True)
class NetworkObservations:
    """What of the network was looked at, with a configuration."""

    ports: tuple[Port, ...] = ()
    gateways: tuple[Contact, ...] = ()
    peers: tuple[Contact, ...] = ()
    data_nodes: tuple[Contact, ...] = ()
    dialled: tuple[Dialled, ...] = ()
    running: bool = False


@dataclass(frozen=True)
class Provider:
    """A node that announces the dataset. ``reason`` says why it does not serve it; ``refused``: it, or the
    job, does not want to. ``rate`` is in bytes a second, of a slice on its way here.
    """

    peer: str
    name: str = ""
    manifest_hash: str = ""
    relayed: bool = False
    reason: str = ""
    refused: bool = False
    largest_slice: int = 0
    rate: float | None = None

    @property
    def called(self) -> str:
        return self.name or self.peer


@dataclass(frozen=True)
class DatasetObservations:
    """Who serves ``name``; ``near`` are names like it under which somebody serves something."""

    name: str
    providers: tuple[Provider, ...] = ()
    near: tuple[str, ...] = ()
    pinned: str | None = None


@dataclass(frozen=True)
class ServiceObservations:
    """What a data node is to serve: names of datasets, and (directory, sentence) of those that cannot be.
    ``announced``: whether it, running, has announced any; None where that is not known.
    """

    names: tuple[str, ...] = ()
    unusable: tuple[tuple[str, str], ...] = ()
    announced: bool | None = None


@dataclass(frozen=True)
class Running:
    """What the running node reports of itself. Shares are of all worker seconds, by reason. ``requests`` are
    those for workers that a worker has received, ``offers`` those that a scheduler has, by what came of them.
    """

    badput: dict[str, float] = field(default_factory=dict)
    renewals: int = 0
    failed_renewals: int = 0
    fetches: int = 0
    failed_fetches: int = 0
    mean_fetch_s: float | None = None
    #: those that gateways have taken; None where nothing is counted
    announcements: int | None = None
    requests: dict[str, int] = field(default_factory=dict)
    offers: dict[str, int] = field(default_factory=dict)
    training: int = 0
    gpu_utilization: tuple[float, ...] = ()


@dataclass(frozen=True)
class Observations:
    """All of it; ``subject`` names whose, and ``unknown`` is what could not be found out."""

    machine: MachineObservations = field(default_factory=MachineObservations)
    identity: IdentityObservations | None = None
    network: NetworkObservations | None = None
    dataset: DatasetObservations | None = None
    running: Running | None = None
    #: of the job's model, numbers in all of its tensors
    parameters: int | None = None
    served: ServiceObservations | None = None
    unknown: tuple[Unknown, ...] = ()

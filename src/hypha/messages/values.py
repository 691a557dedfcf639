"""What messages consist of: their two base classes, bounded names, peers, resources, stamps of jobs."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

#: Bounds of what a peer states of itself (:mod:`hypha.features`); a message beyond them is ``malformed``.
MAX_VERSION_LENGTH = 64
MAX_FEATURES = 256

#: A PeerID as text, and an address with two of them and a name: what is longer is no such thing, and telling
#: so would take time that grows with the square of its length.
MAX_PEER_ID_LENGTH = 128
MAX_ADDRESS_LENGTH = 512

#: Addresses of one peer: those of all its network interfaces, and through each of its gateways.
MAX_ADDRESSES_SENT = 128

#: Of a job, a lease, a request or an executor process. Others remember them.
MAX_ID_LENGTH = 256
Id = Annotated[str, Meta(max_length=MAX_ID_LENGTH)]
PeerId = Annotated[str, Meta(max_length=MAX_PEER_ID_LENGTH)]
VersionName = Annotated[str, Meta(max_length=MAX_VERSION_LENGTH)]
FeatureNames = Annotated[tuple[VersionName, ...], Meta(max_length=MAX_FEATURES)]
Address = Annotated[str, Meta(max_length=MAX_ADDRESS_LENGTH)]
Addresses = Annotated[tuple[Address, ...], Meta(max_length=MAX_ADDRESSES_SENT)]


def _kebab(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


class Message(Struct, frozen=True, tag=_kebab, tag_field="type", kw_only=True, omit_defaults=True):
    """A frozen, tagged struct."""


class Value(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A frozen struct that is part of messages."""


class PeerRef(Value):
    """A peer and where it may be reached; ``addresses`` are multiaddrs, circuit addresses included."""

    peer: PeerId
    addresses: Addresses = ()


class Resources(Value):
    """Amounts a worker has, a request needs or a lease reserves; GB for all but ``cpu`` (cores)."""

    cpu: float = 0.0
    memory: float = 0.0
    gpu: float = 0.0
    storage: float = 0.0


ExecutorClass = Literal["train", "aggregate"]


class ExecutorDescriptor(Value):
    """What kind of executor is wanted or offered, and its name (``diloco-transformer``)."""

    kind: ExecutorClass
    name: str


class JobStamp(Value):
    """Which job, which generation of it, which round: what fences off late and foreign messages.

    ``attempt``, of theta and of what depends on it: how often its receiver has begun the round anew
    (see :class:`SendModel`).
    """

    job_id: Id
    generation: int = 0
    round: int = 0
    attempt: int = 0


def encode(value: Struct) -> bytes:
    """MessagePack of ``value``."""
    return msgspec.msgpack.encode(value)


def encode_json(value: Struct) -> bytes:
    """JSON of ``value``."""
    return msgspec.json.encode(value)

"""What nodes, and gateways above all, tell of themselves, of the way to them and of who is connected."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hypha.messages.values import Address, FeatureNames, Message, PeerId, Value, VersionName

#: The number of a node that runs, and of how many of them a gateway asks another one in one request.
MAX_INSTANCE_LENGTH = 256
MAX_NODE_RUNS = 500

#: Of one :class:`MeasureBandwidth`, each way; the request with its envelope stays below MAX_REQUEST_BYTES.
MAX_MEASURED_BYTES = 1 << 19

#: Addresses that one :class:`DialBack` may name.
MAX_DIALLED_BACK = 8

#: Packages of which a node states the version it runs with.
MAX_PACKAGES = 32


class Health(Message):
    """Are you well? Answered by every component."""


class HealthReport(Message):
    """``component`` is ``hypha-worker`` and so on; ``details`` says more in words. ``features``
    (:mod:`hypha.features`): without them it is older than that field.

    The rest is for whoever looks for a fault, nothing is decided by it: ``time_s`` is the sender's time of
    day in seconds since 1970, the only one on the wire, ``seen_at`` (multiaddrs, the newest last) where
    direct connections of the caller come from as the sender sees it, and ``packages`` has the versions that
    it runs with.
    """

    healthy: bool
    component: str
    version: str
    peer: str
    uptime_s: float
    details: dict[str, str] = {}
    features: FeatureNames = ()
    time_s: float | None = None
    seen_at: Annotated[tuple[Address, ...], Meta(max_length=MAX_DIALLED_BACK)] = ()
    packages: Annotated[dict[VersionName, VersionName], Meta(max_length=MAX_PACKAGES)] = {}


class SameCertificate(Message):
    """Another node uses the certificate of the one that is told so; it has come from ``address`` to
    ``gateway``, where it did not come to the one that tells it, and was turned away. Answered by every
    component.
    """

    address: str = ""
    gateway: PeerId = ""


class NodeRun(Value):
    """A node that a gateway is connected with, for ``connected_s`` by now, or that asks to be let in, without
    it. ``instance`` is the number that the node states in its handshake.
    """

    peer: PeerId
    instance: Annotated[str, Meta(max_length=MAX_INSTANCE_LENGTH)]
    address: Address = ""
    connected_s: float | None = None


class FindDoubles(Message):
    """A gateway asks another: which of ``nodes`` are there as well, as other nodes with the same certificate
    that have been connected for longer and are alive?
    """

    nodes: Annotated[tuple[NodeRun, ...], Meta(max_length=MAX_NODE_RUNS)] = ()


class DoublesFound(Message):
    """Those that are, each with its address there."""

    found: Annotated[tuple[NodeRun, ...], Meta(max_length=MAX_NODE_RUNS)] = ()


#: In one answer: more say how many they are.
MAX_LISTED_PEERS = 1000


class ListPeers(Message):
    """Which nodes are connected with the gateway that is asked? With ``peer``: that one alone, and where it
    may be dialled.
    """

    peer: PeerId = ""


class ListedPeer(Value):
    """A node that is connected with a gateway, by its certificate, and by which ``way``. ``addresses`` are
    what it says of itself.
    """

    peer: str
    name: str = ""
    organization: str = ""
    roles: tuple[str, ...] = ()
    way: Literal["direct", "relayed"] = "direct"
    round_trip_s: float | None = None
    addresses: tuple[str, ...] = ()


class PeerList(Message):
    """Those connected with a gateway, in order of their PeerIDs, and how many ``more`` there are."""

    peers: tuple[ListedPeer, ...] = ()
    more: int = 0


class DialBack(Message):
    """Can the caller be dialled at these addresses? Answered by gateways, which try those alone whose host is
    the IP address that a connection of the caller comes from: nobody has a third party dialled.
    """

    addresses: Annotated[tuple[Address, ...], Meta(max_length=MAX_DIALLED_BACK)]


class DialResult(Value):
    """What came of dialling ``address``: the PeerID of the node there, or why there is none."""

    address: str
    peer: str = ""
    reason: str = ""


class DialedBack(Message):
    """One result for each address that was asked for, in that order."""

    results: tuple[DialResult, ...]


class MeasureBandwidth(Message):
    """How fast is the way between us? The answer to ``payload`` has ``reply_bytes`` bytes. Answered by every
    component, for one caller at a time and within a budget.
    """

    payload: Annotated[bytes, Meta(max_length=MAX_MEASURED_BYTES)] = b""
    reply_bytes: Annotated[int, Meta(ge=0, le=MAX_MEASURED_BYTES)] = 0


class BandwidthMeasured(Message):
    """As many bytes as were asked for."""

    payload: bytes = b""

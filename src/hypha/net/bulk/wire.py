"""The words of the bulk plane: what is said on a connection around the bytes of a file.

Whoever has opened a connection speaks first. It offers a file (:class:`~hypha.messages.BulkOffer`), which is
answered by :class:`Go` or a :class:`Verdict`, and sends the bytes from the offset in ``Go`` on; or it asks
for one (:class:`WantFile`, which includes its ``Go``), which is answered by :class:`FileFound` or a
``Verdict``, and the bytes. Whoever receives ends with a ``Verdict``, at any time. An end that is busy says
:class:`Working` meanwhile. After an ``ok`` or a refusal a socket may be kept; the next frame on it is another
offer or want of the same end. Whoever cannot dial asks to be dialled (:class:`~hypha.messages.BulkDial`):
such a connection begins with the dialler's :class:`Hello`, after which the other end speaks first.

A frame is its length (4 bytes, big-endian) and a MessagePack struct. A file's bytes follow in blocks of at
most ``BLOCK_BYTES`` plain bytes, each behind its length, of which the highest bit says whether it is
compressed (:mod:`hypha.net.bulk.blocks`); on a socket they are sealed.

Whether a peer may send or take files of a kind is decided by its role (:data:`hypha.access.KINDS`)."""

from __future__ import annotations

import secrets
import struct
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from hypha.access import KINDS, NOBODY, Allowed, carries, may_act_as, named
from hypha.decoding import decode
from hypha.errors import PeerUnreachable, Refused, Undecodable
from hypha.messages import WIRE_VERSION, BulkOffer, PeerRef, PullFile, TransferMeta
from hypha.naming import cleaned
from hypha.net.rpc import MAX_REASON_LENGTH
from hypha.node import Node
from hypha.pki.identity import Identity

BULK_PROTOCOL = "/hypha/bulk/1"
BULK_ALPN = ("hypha-bulk/3",)

#: Read, written and compressed at a time.
BLOCK_BYTES = 1 << 20
#: No frame is longer than this: what is said of theta names its contributors, perhaps thousands.
MAX_FRAME_BYTES = 256 << 10
#: A compressed block may be a little longer than what is in it.
MAX_BLOCK_BYTES = BLOCK_BYTES + (BLOCK_BYTES >> 4)

HANDSHAKE_TIMEOUT_S = 5.0
#: No byte for this long, and the connection is given up.
STALL_TIMEOUT_S = 30.0
#: An end that is busy says ``Working`` after the first, and then every so often.
SOON_S = 0.5
WORKING_INTERVAL_S = 5.0

_LENGTH = struct.Struct(">I")
LENGTH_BYTES = _LENGTH.size


class BulkConnections(Node, Protocol):
    """What the bulk plane needs of its node, which is a :class:`~hypha.net.node.Libp2pNode`."""

    @property
    def identity(self) -> Identity:
        """This node's identity; its contexts are asked for anew for each connection."""

    async def open_stream(self, peer: PeerRef | str, protocol: str) -> Any:
        """A libp2p stream (``read(n)``, ``write(data)``, ``close()``, ``reset()``), through a relay when
        there is no other way; PeerUnreachable when it cannot be had.
        """

    def set_stream_handler(self, protocol: str, handler: Any) -> None:
        """``async handler(stream, caller)`` for each stream that a peer opens; the handler closes it."""

    def bulk_addresses(self) -> list[str]:
        """Direct multiaddrs of this node that others may dial (the same port as libp2p's); no circuits."""

    async def bulk_targets(self, peer: str, offered: tuple[str, ...]) -> list[tuple[str, int]]:
        """``(host, port)`` to dial for bulk, best first: the remote end of live direct connections to
        ``peer`` that *this* node dialled, then ``offered`` and known direct addresses that are not
        excluded. Empty when only a relay leads there.
        """

    def reached_by(self, peer: str) -> bool:
        """Whether ``peer`` has a live direct connection to this node that *it* dialled, and there is
        none that this node dialled: so it can reach us, and whether we can reach it is unknown.
        """


class Hello(Struct, frozen=True, tag="hello"):
    """The first word of who was asked by a ``BulkDial`` to dial, and its ``token``."""

    token: str
    v: int = WIRE_VERSION


class Go(Struct, frozen=True, tag="go"):
    """The receiver wants the bytes from ``offset`` on, on a socket sealed with ``key``, which is of this file
    and this connection alone.
    """

    offset: int
    key: bytes = b""


class WantFile(Struct, frozen=True, tag="want"):
    """The file that ``request`` names is asked for; ``go`` is what would answer an offer of it."""

    request: PullFile
    go: Go
    traceparent: str | None = None


class FileFound(Struct, frozen=True, tag="found"):
    """The answer to :class:`WantFile`; the bytes follow at once, from the offset on that was asked for."""

    meta: TransferMeta
    traceparent: str | None = None


class Working(Struct, frozen=True, tag="working"):
    """The other end is busy (hashing, syncing, checking, or with other files), not dead."""


class Verdict(Struct, frozen=True, tag="verdict"):
    """The end. ``ok``; ``corrupt``; ``refused`` with a refusal code; ``failed`` on the receiver's side.
    ``again``: another attempt may well succeed.
    """

    outcome: str
    code: str = ""
    reason: str = ""
    again: bool = False

    def raise_if_refused(self, peer: str) -> None:
        """Raise what ``peer`` has refused as Refused."""
        if self.outcome == "refused":
            raise Refused(self.code, self.reason, peer)


Frame = Hello | Go | Working | Verdict | BulkOffer | WantFile | FileFound

_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


class ConnectionBroken(Exception):
    """A connection of the bulk plane ended, stalled or said nonsense."""


def encode_frame(frame: Frame) -> bytes:
    """Length and struct."""
    payload = msgspec.msgpack.encode(frame)
    return encode_length(len(payload)) + payload


def decode_frame(payload: bytes) -> Frame:
    """The struct; ConnectionBroken when it is none."""
    try:
        frame = decode(_decoder.decode, payload)
    except Undecodable as exc:
        raise ConnectionBroken(f"the peer sent nonsense: {exc}") from exc
    if isinstance(frame, Verdict):
        reason = frame.reason[:MAX_REASON_LENGTH]
        return msgspec.structs.replace(frame, code=cleaned(frame.code), reason=reason)
    return frame


def encode_length(length: int) -> bytes:
    """What goes before a frame or block."""
    return _LENGTH.pack(length)


def decode_length(head: bytes, limit: int) -> int:
    """Length of a frame or block; ConnectionBroken over ``limit``."""
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= limit:
        raise ConnectionBroken(f"the peer announced {length} bytes where at most {limit} may come")
    return int(length)


def id_of(peer: PeerRef | str) -> str:
    """The PeerID of ``peer``."""
    return peer.peer if isinstance(peer, PeerRef) else peer


def new_token() -> str:
    """Unguessable, though knowing it is not enough."""
    return secrets.token_urlsafe(24)


def require_sender(links: BulkConnections, peer: str, kind: str) -> None:
    """Refused unless ``peer``, which is or was connected, may send files of ``kind``."""
    allowed = KINDS[kind].senders if kind in KINDS else NOBODY
    _require(links, peer, allowed, f"files of kind {kind!r} come from a certificate with the role")


def require_receiver(links: BulkConnections, peer: str, kind: str) -> None:
    """Refused unless ``peer``, which is or was connected, may take files of ``kind``."""
    allowed = KINDS[kind].receivers if kind in KINDS else NOBODY
    _require(links, peer, allowed, f"files of kind {kind!r} go to a certificate with the role")


def _require(links: BulkConnections, peer: str, allowed: Allowed, what: str) -> None:
    if peer == links.identity.peer_id:
        return
    try:
        has = links.roles_of(peer)
    except PeerUnreachable as exc:
        raise Refused("role", f"{what} {named(allowed)}; that of {peer} is not known") from exc
    if not may_act_as(has, allowed):
        raise Refused("role", f"{what} {named(allowed)}; that of {peer} carries {carries(has)}")

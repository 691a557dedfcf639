"""Messages whose format is libp2p's own: protobuf behind a length. Read within bounds, and decoded.

A PeerID is written in base 58, which takes time that grows with the square of its length: one of a megabyte
would hold up the loop for hours. So its length is looked at first, here and in
:mod:`hypha.net.peers.addresses`.

A ``traceparent`` in those of the DHT and of the relay is added behind the message, under a field number that
libp2p does not use: whoever does not know a field of a protobuf message passes over it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_uvarint, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from hypha.decoding import decode
from hypha.errors import Undecodable
from hypha.tracing import traceparent

#: A multihash of a key: 34 bytes, or 38 with an Ed25519 key in it, 42 in the longest form in use.
MAX_PEER_ID_BYTES = 64
#: Of one address in its binary form; a name of the DNS has 253 characters at most.
MAX_ADDRESS_BYTES = 512
#: Of a message of the relay: a PeerID, a status, limits.
MAX_RELAY_BYTES = 64 << 10
_FIELD = 29_808
_LENGTH_DELIMITED = 2
#: no ``traceparent`` is longer
_MAX_BYTES = 128


async def read_message(stream: Any, kind: type[Any], limit: int) -> Any:
    """The next message of type ``kind``, of at most ``limit`` bytes. Undecodable, and what streams raise."""
    return decode_message(kind, await read_varint_prefixed_bytes_limited(stream, limit))


def decode_message(kind: type[Any], data: bytes) -> Any:
    """``data`` as a message of the protobuf type ``kind``. Raises Undecodable."""
    message = kind()
    decode(message.ParseFromString, data)
    return message


def peer_id_in(data: bytes) -> str:
    """The PeerID whose bytes are ``data``. Raises Undecodable."""
    if not 0 < len(data) <= MAX_PEER_ID_BYTES:
        raise Undecodable(f"a PeerID has up to {MAX_PEER_ID_BYTES} bytes, and this one {len(data)}")
    return str(ID(data))


def addresses_in(found: Iterable[bytes], most: int) -> list[str]:
    """Those of the first ``most`` of ``found`` that are multiaddresses, as text."""
    addresses = []
    for _, data in zip(range(most), found, strict=False):
        try:
            if len(data) <= MAX_ADDRESS_BYTES:
                addresses.append(decode(lambda one: str(Multiaddr(one)), data))
        except Undecodable:
            continue  # of an address that this node knows no protocol of, it is no news
    return addresses


def add_traceparent(message: Any) -> None:
    """Have ``message``, a protobuf one, name the current span, if there is one."""
    if (current := traceparent()) is not None:
        data = current.encode()
        head = encode_uvarint(_FIELD << 3 | _LENGTH_DELIMITED) + encode_uvarint(len(data))
        message.MergeFromString(head + data)


def traceparent_of(message: Any) -> str | None:
    """The ``traceparent`` in ``message``, which came from a peer, if there is one."""
    fields: Any = UnknownFieldSet(message)
    for found in fields:
        if (found.field_number, found.wire_type) == (_FIELD, _LENGTH_DELIMITED):
            data: bytes = found.data
            return data.decode(errors="replace") if len(data) <= _MAX_BYTES else None
    return None

"""A ``traceparent`` in messages whose format is libp2p's own: those of the DHT and of the relay.

They are protobuf messages, and whoever does not know a field of one passes over it. So the field is added
behind the message, under a number that libp2p does not use.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet
from libp2p.utils.varint import encode_uvarint

from hypha.tracing import traceparent

_FIELD = 29_808
_LENGTH_DELIMITED = 2
#: no ``traceparent`` is longer
_MAX_BYTES = 128


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

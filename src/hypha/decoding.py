"""The one door through which bytes and text that others wrote become values.

Decoders fail in many ways: msgspec raises its own errors, but ``UnicodeDecodeError`` for text that is no
UTF-8 and ``RecursionError`` for what is nested deeper than the stack; protobuf, ``json``, ``struct`` and
multiaddresses each have others; a length of 2^63 is an ``OverflowError`` or a ``MemoryError``. Whoever
decodes what a peer sent, or what stands in somebody else's file, calls :func:`decode` and has one error to
expect. ``tests/test_decoding.py`` holds the source to that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from hypha.errors import Undecodable

Input = TypeVar("Input")
T = TypeVar("T")

#: Of what a decoder says: some quote all that they were given.
MAX_REASON = 300


def decode(read: Callable[[Input], T], data: Input) -> T:
    """``read(data)``, where others wrote ``data``. Raises :class:`Undecodable`, whatever ``read`` raises."""
    try:
        return read(data)
    except Exception as exc:
        text = str(exc).encode("utf-8", "replace").decode()
        text = " ".join(text[: 2 * MAX_REASON].split())[:MAX_REASON]
        raise Undecodable(text or type(exc).__name__) from exc


def decode_json(text: bytes | str, kind: type[T]) -> T:
    """The JSON document ``text``, which others wrote, as a ``kind``. Raises :class:`Undecodable`, also for an
    integer of more than 64 bits, which JSON may have: where it is sent on, in MessagePack, it would be an
    error of the task that sends it.
    """

    def read(one: bytes | str) -> T:
        value = msgspec.json.decode(one, type=kind)
        msgspec.msgpack.encode(value)
        return value

    return decode(read, text)

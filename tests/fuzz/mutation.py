"""How good bytes become bad ones: the places of a message are kept, and what stands in them is not.

A mutation is a plain value, so that hypothesis can shrink a row of them and others draw them from a seed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
from hypothesis import strategies as st
from libp2p.utils.varint import encode_uvarint

#: What decoders have stumbled over, here or elsewhere.
DICTIONARY = (
    # no UTF-8: a lone byte, a cut sequence, a surrogate, an overlong nought, beyond the last plane
    b"\xff",
    b"\xe2\x82",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\\ud800",
    b"\x00",
    # depth: arrays, maps and JSON of each, messages of protobuf in messages
    b"\x91" * 3000,
    b"\x81\xa1a" * 2000,
    b"[" * 3000,
    b'{"a":' * 2000,
    b"\x0a\x7f" * 150,
    # lengths: of MessagePack, of safetensors, of varints, of frames
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    struct.pack("<Q", (1 << 64) - 1),
    struct.pack("<Q", 1 << 62),
    struct.pack("<Q", 1),
    struct.pack(">I", (1 << 32) - 1),
    struct.pack(">I", 0),
    encode_uvarint(1 << 63),
    encode_uvarint(1 << 31),
    b"\xff" * 11,
    # numbers
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb" + struct.pack(">d", float("nan")),
    b"\xcb" + struct.pack(">d", float("inf")),
    b"9" * 5000,
    b"-9223372036854775809",
    b"1e400",
    b"NaN",
    b"null",
    # what multistream-select, traces, addresses and names are made of
    b"\x13/multistream/1.0.0\n",
    b"na\n",
    b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01",
    b"/ip4/127.0.0.1/tcp/99999/p2p-circuit/p2p/",
    b"/dns4/" + b"a" * 300,
    b"../" * 10,
)

#: In place of any value of a message that is encoded well.
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1 << 31,
    (1 << 63) - 1,
    (1 << 64) - 1,
    -(1 << 63),
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    5e-324,
    "",
    "\x00",
    "a" * 5000,
    "é\u202e\U0010ffff",
    "../../etc/passwd",
    "00-zz-zz-zz",
    "/dns4/" + "a" * 70 + "/tcp/1",
    "0" * 200,
    b"",
    b"\xff",
    [],
    {},
    [[[[[[[[]]]]]]]],
    {"type": "health"},
    ["a"] * 2000,
)

#: (what to do, where as a share of the length, how much, with what)
Mutation = tuple[str, float, int, bytes]
HOW = ("replace", "insert", "cut", "truncate", "flip", "repeat", "swap")


def mutations() -> st.SearchStrategy[list[Mutation]]:
    """For hypothesis."""
    piece = st.sampled_from(DICTIONARY) | st.binary(max_size=16)
    one = st.tuples(st.sampled_from(HOW), st.floats(0, 1), st.integers(0, 64), piece)
    return st.lists(one, max_size=4)


def drawn(random: Random) -> list[Mutation]:
    """From a seed."""

    def piece() -> bytes:
        return random.choice(DICTIONARY) if random.random() < 0.7 else random.randbytes(random.randrange(16))

    return [
        (random.choice(HOW), random.random(), random.randrange(64), piece())
        for _ in range(random.randrange(4))
    ]


def mutated(data: bytes, row: Sequence[Mutation]) -> bytes:
    """``data`` after each of them."""
    for how, where, much, piece in row:
        at = int(where * len(data))
        match how:
            case "replace":
                data = data[:at] + piece + data[at + len(piece) :]
            case "insert":
                data = data[:at] + piece + data[at:]
            case "cut":
                data = data[:at] + data[at + much :]
            case "truncate":
                data = data[:at]
            case "flip" if at < len(data):
                data = data[:at] + bytes([data[at] ^ (1 << much % 8)]) + data[at + 1 :]
            case "repeat":
                data = data[:at] + data[at : at + much] * 8 + data[at:]
            case "swap":
                data = data[at:] + data[:at]
    return data[: 1 << 20]


def with_odd_value(tree: Any, where: float, value: Any) -> Any:
    """A copy of ``tree``, made of lists, dictionaries and plain values, with ``value`` in one place."""
    places = list(_places(tree, ()))
    return _placed(tree, places[min(int(where * len(places)), len(places) - 1)], value)


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    yield path
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, one in inside:
        yield from _places(one, (*path, key))


def _placed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    if isinstance(tree, dict):
        return {**tree, path[0]: _placed(tree[path[0]], path[1:], value)}
    return [_placed(one, path[1:], value) if number == path[0] else one for number, one in enumerate(tree)]


def oddly_encoded(value: Any, encoding: str, where: float, odd: Any) -> bytes:
    """A message with an odd value in one place, encoded as it should be."""
    codec = msgspec.json if encoding == "json" else msgspec.msgpack
    return codec.encode(with_odd_value(codec.decode(codec.encode(value)), where, odd))

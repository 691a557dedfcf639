"""Sealed blocks: nobody on the way reads one, and one that is not what was sent does not open."""

from __future__ import annotations

import os

import pytest

from hypha.net.bulk.blocks import KEY_BYTES, TAG_BYTES, Opener, Sealer, decode_block_length, new_key
from hypha.net.bulk.wire import (
    LENGTH_BYTES,
    MAX_BLOCK_BYTES,
    ConnectionBroken,
    decode_length,
)

BLOCKS = [b"the first block", b"x" * 100_000, b"the last one"]


def sealed_blocks(key: bytes) -> list[bytes]:
    sealer = Sealer(key)
    return [bytes(sealer.seal(block)) for block in BLOCKS]


def opened(opener: Opener, sealed: bytes) -> bytes:
    length = decode_length(sealed[:LENGTH_BYTES], MAX_BLOCK_BYTES)
    rest = memoryview(sealed)[LENGTH_BYTES:]
    assert len(rest) == length + TAG_BYTES
    return bytes(opener.open(rest))


def test_blocks_come_back_as_they_went() -> None:
    key = new_key()
    opener = Opener(key)
    assert [opened(opener, sealed) for sealed in sealed_blocks(key)] == BLOCKS


def test_the_longest_block_fits() -> None:
    key, block = new_key(), os.urandom(MAX_BLOCK_BYTES)
    assert opened(Opener(key), bytes(Sealer(key).seal(block))) == block


def test_what_is_inside_is_not_seen_and_equal_blocks_differ() -> None:
    sealer = Sealer(new_key())
    block = b"a secret that is long enough to be seen " * 100
    first, second = bytes(sealer.seal(block)), bytes(sealer.seal(block))
    assert block[:40] not in first
    assert first != second


@pytest.mark.parametrize("at", [LENGTH_BYTES, LENGTH_BYTES + 7, -TAG_BYTES, -1])
def test_an_altered_block_does_not_open(at: int) -> None:
    key = new_key()
    sealed = bytearray(sealed_blocks(key)[0])
    sealed[at] ^= 1
    with pytest.raises(ConnectionBroken, match="altered"):
        opened(Opener(key), bytes(sealed))


def test_nobody_on_the_way_says_that_a_block_is_compressed() -> None:
    for packed in (False, True):
        key = new_key()
        sealed = bytes(Sealer(key).seal(b"a block", packed))
        assert decode_block_length(sealed[:LENGTH_BYTES]) == (7, packed)
        rest = memoryview(sealed)[LENGTH_BYTES:]
        with pytest.raises(ConnectionBroken, match="altered"):
            Opener(key).open(rest, not packed)
        assert bytes(Opener(key).open(rest, packed)) == b"a block"


def test_blocks_that_are_left_out_repeated_or_exchanged_do_not_open() -> None:
    key = new_key()
    first, second, third = sealed_blocks(key)
    for order in ([second], [first, first], [first, third], [first, second, second]):
        opener = Opener(key)
        for sealed in order[:-1]:
            opened(opener, sealed)
        with pytest.raises(ConnectionBroken, match="altered"):
            opened(opener, order[-1])


def test_a_block_of_another_connection_does_not_open() -> None:
    with pytest.raises(ConnectionBroken, match="altered"):
        opened(Opener(new_key()), sealed_blocks(new_key())[0])


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(KEY_BYTES + 1)])
def test_what_is_no_key_is_refused(key: bytes) -> None:
    with pytest.raises(ConnectionBroken, match="a key of"):
        Sealer(key)

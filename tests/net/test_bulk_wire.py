"""Frames and blocks of the bulk plane: what is nonsense is refused before it costs anything."""

from __future__ import annotations

import os
import struct

import msgspec
import pytest
import zstandard

from hypha.messages import TransferMeta
from hypha.net.bulk.blocks import BlockPacker, Packing, decode_block_length, encode_block_length, unpack_block
from hypha.net.bulk.wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_BLOCK_BYTES,
    MAX_FRAME_BYTES,
    ConnectionBroken,
    Frame,
    Go,
    Hello,
    Verdict,
    Working,
    decode_frame,
    decode_length,
    encode_frame,
)


@pytest.mark.parametrize(
    "frame",
    [
        Hello("token"),
        Go(1 << 40, bytes(range(32))),
        Go(0),
        Working(),
        Verdict("refused", "stale", "round 2 is over", again=True),
    ],
)
def test_frames_come_back_as_they_went(frame: Frame) -> None:
    data = encode_frame(frame)
    assert decode_length(data[:LENGTH_BYTES], MAX_FRAME_BYTES) == len(data) - LENGTH_BYTES
    assert decode_frame(data[LENGTH_BYTES:]) == frame


@pytest.mark.parametrize(
    "payload", [b"", b"\xff", b"hello", msgspec.msgpack.encode({"type": "boss"}), msgspec.msgpack.encode([1])]
)
def test_nonsense_is_a_broken_link(payload: bytes) -> None:
    with pytest.raises(ConnectionBroken):
        decode_frame(payload)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, (1 << 32) - 1])
def test_lengths_are_bounded(length: int) -> None:
    with pytest.raises(ConnectionBroken, match=str(length)):
        decode_length(struct.pack(">I", length), MAX_FRAME_BYTES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [0, 1, MAX_BLOCK_BYTES, MAX_BLOCK_BYTES + 1, (1 << 31) - 1])
def test_the_highest_bit_of_a_blocks_length_says_that_it_is_compressed(length: int, packed: bool) -> None:
    head = encode_block_length(length, packed)
    if 0 < length <= MAX_BLOCK_BYTES:
        assert decode_block_length(head) == (length, packed)
    else:
        with pytest.raises(ConnectionBroken, match=str(length)):
            decode_block_length(head)


@pytest.mark.parametrize("plain", [b"x", bytes(BLOCK_BYTES), os.urandom(BLOCK_BYTES)])
def test_blocks_come_back_as_they_went(plain: bytes) -> None:
    meta = TransferMeta(kind="slice", name="a", size=len(plain))
    data, packed = BlockPacker(meta, Go(0), Packing("always")).packed(memoryview(plain))
    assert packed == (plain == bytes(BLOCK_BYTES)), "only what shrinks goes compressed"
    assert len(data) <= MAX_BLOCK_BYTES
    assert (unpack_block(data) if packed else data) == plain


@pytest.mark.parametrize(
    "block",
    [
        b"no zstd at all",
        zstandard.ZstdCompressor().compress(bytes(BLOCK_BYTES + 1)),
        # a bomb: some kilobytes that promise a gigabyte
        zstandard.ZstdCompressor().compress(bytes(1 << 28)),
        zstandard.ZstdCompressor(write_content_size=False).compress(b"of unknown length"),
        zstandard.ZstdCompressor().compress(os.urandom(5000))[:-100],
    ],
    ids=["junk", "too-large", "bomb", "unknown", "cut"],
)
def test_bad_blocks_are_a_broken_link(block: bytes) -> None:
    with pytest.raises(ConnectionBroken):
        unpack_block(block)

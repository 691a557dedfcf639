"""The bytes of a file on their way: in blocks, each perhaps compressed, on a direct connection sealed.

TLS proves who the two ends of a direct connection are and carries every word they say. It would cut a file
into records of 16 KiB, each copied through its own buffers and asked for from Python; sealed in blocks of a
megabyte by the same cipher (AES-256-GCM), a file takes half of the processor time (``bench/bulk.py``), and
that is the training's. The receiver of a file makes a key for it and says it in ``Go``, within TLS: so it is
as secret as the handshake, and of that file on that connection alone. A block is its length (4 bytes,
big-endian) and then its sealed bytes with their tag of 16; whether it is compressed is sealed with it. The
nonce is its number (NIST SP 800-38D, section 8.2.1: no nonce comes twice under one key). Blocks that are
altered, repeated, left out or exchanged do not open; one that is missing at the end is missed by the file's
length.

A block is compressed where that saves more time on the line than it costs. :class:`Packing` is pure: it is
told how long blocks took to compress and to send, and says whether to compress the next one. A line is
measured first, on blocks as they are; then a block is tried. Where it pays, the following ones are compressed
too, for as long as it does; where it does not, another block is tried after a while, and later each time.
Time is what counts, so a fast line, data that does not shrink and a cap of the line (``[limits]``) all have
their say without being asked about."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hypha.messages import TransferMeta
from hypha.net.bulk.files import SourceFile
from hypha.net.bulk.wire import (
    BLOCK_BYTES,
    LENGTH_BYTES,
    MAX_BLOCK_BYTES,
    ConnectionBroken,
    Go,
    decode_length,
    encode_length,
)

#: Kinds of files of which blocks are tried. What is left are floats, which do not shrink.
KINDS = frozenset({"slice"})
#: A line is known after so many seconds of writing, or so many bytes.
MEASURE_S = 0.1
MEASURE_BYTES = 8 << 20
#: What was measured longer ago than so many seconds of writing counts less and less.
MEMORY_S = 2.0
#: So much of a block is compressed to see whether that pays.
SAMPLE_BYTES = 64 << 10
#: The time that is saved must be so many times that which compressing takes: the other end has to unpack, and
#: the processor is wanted for training.
MARGIN = 1.5
#: After a sample that did not pay the next one is due after so many bytes, doubled each time.
SAMPLE_AGAIN_BYTES = 4 << 20
MOST_AGAIN_BYTES = 256 << 20
#: Compressing has held up the line for so many bytes: it is measured anew, as it may be faster than it was.
MEASURE_ANEW_BYTES = 256 << 20
#: In the first block; twice as many each time, up to ``BLOCK_BYTES``: a block that is cut is lost, and a
#: connection that never lasts long is to bring something each time.
FIRST_BLOCK_BYTES = 16 << 10
#: The bit of a length that says that the block behind it is compressed.
_PACKED = 1 << 31
KEY_BYTES = 32
TAG_BYTES = 16
_NONCE_BYTES = 12
#: Authenticated beside a block that is compressed.
_TOLD_PACKED = b"zstd"


@dataclass
class Known:
    """What is known of the way to a peer, from one file to the next."""

    #: bytes a second
    rate: float | None = None
    #: whether compressing paid last
    pays: bool = False
    #: since the last sample, and after how many the next one is due
    unsampled: int = 0
    again_bytes: int = SAMPLE_AGAIN_BYTES
    #: for how many bytes it was compressing, and not the line, that took the time
    held_up: int = 0


class Packing:
    """Of one file, with zstd's ``level``. ``always``: each block is compressed, and sent so if it shrank."""

    def __init__(self, mode: Literal["auto", "always"], level: int = 3, known: Known | None = None) -> None:
        self.level = level
        self._always = mode == "always"
        #: for the next file to the same peer
        self.known = replace(known or Known())
        self._sent_bytes, self._sent_s = 0.0, 0.0
        #: what compressing the present block took
        self._took_s = 0.0
        #: of what was compressed
        self.plain_bytes, self.packed_bytes = 0, 0

    @property
    def pays(self) -> bool:
        return self._always or self.known.pays

    def wants_sample(self, size: int) -> bool:
        """Whether to compress ``SAMPLE_BYTES`` of the next block, of ``size`` bytes, and see."""
        if self._always or self.known.pays or self.known.rate is None or size < SAMPLE_BYTES:
            return False
        return self.known.unsampled >= self.known.again_bytes

    def sampled(self, plain: int, packed: int, took_s: float) -> None:
        """So many bytes were compressed to so many, within ``took_s``, to see."""
        self.known.unsampled = 0
        self._judge(plain, packed, took_s)
        # where it does not pay it is looked at less and less, and soon where it may end to
        again = SAMPLE_AGAIN_BYTES if self.known.pays else 2 * self.known.again_bytes
        self.known.again_bytes = min(again, MOST_AGAIN_BYTES)

    def packed(self, plain: int, packed: int, took_s: float) -> bool:
        """A block was compressed within ``took_s``; whether to send it so."""
        self._judge(plain, packed, took_s)
        if packed >= plain:
            return False
        self._took_s = took_s
        self.plain_bytes += plain
        self.packed_bytes += packed
        return True

    def sent(self, plain: int, wire: int, took_s: float) -> None:
        """A block of ``plain`` bytes went as ``wire`` bytes, and writing them took so long."""
        if self._always:
            return
        packing_s, self._took_s = self._took_s, 0.0
        if packing_s:
            if took_s < packing_s / 2:
                # the kernel's buffer ran empty meanwhile: this says what we can do, and not what the line can
                self.known.held_up += plain
                if self.known.held_up >= MEASURE_ANEW_BYTES:
                    self.known.rate, self.known.pays, self.known.held_up = None, False, 0
                    self._sent_bytes, self._sent_s = 0.0, 0.0
                return
            # the buffer was being emptied while the block was compressed
            took_s += packing_s
        else:
            self.known.unsampled += plain
        self.known.held_up = 0
        self._sent_bytes += wire
        self._sent_s += took_s
        if self._sent_s >= MEASURE_S or self._sent_bytes >= MEASURE_BYTES:
            if self.known.rate is None:
                self.known.unsampled = self.known.again_bytes  # now it can be judged
            self.known.rate = self._sent_bytes / max(self._sent_s, 1e-6)
            if self._sent_s > MEMORY_S:
                self._sent_bytes /= 2
                self._sent_s /= 2

    def _judge(self, plain: int, packed: int, took_s: float) -> None:
        self.known.pays = self.known.rate is not None and (plain - packed) / self.known.rate > MARGIN * took_s


class BlockPacker:
    """The blocks of one file, from where ``go`` wants them on, compressed as ``packing`` thinks fit."""

    def __init__(self, meta: TransferMeta, go: Go, packing: Packing | None) -> None:
        self.go = go
        self.left = meta.size - go.offset
        self._packing = packing
        self._size = FIRST_BLOCK_BYTES
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._compressor = zstandard.ZstdCompressor(level=3 if packing is None else packing.level)

    def read(self, source: SourceFile) -> tuple[int, memoryview | bytes, bool]:
        """The next block of ``source``: how many bytes of the file are in it, how it is to go, good until the
        next one, and whether it is compressed. FileChanged.
        """
        block = self._buffer[: source.read_into(self._buffer[: min(self.left, self._size)])]
        self._size = min(2 * self._size, BLOCK_BYTES)
        self.left -= len(block)
        return len(block), *self.packed(block)

    def packed(self, block: memoryview) -> tuple[memoryview | bytes, bool]:
        """A block as it is to go, and whether it is compressed."""
        packing = self._packing
        if packing is not None and packing.wants_sample(len(block)):
            began = time.perf_counter()
            sample = self._compress(block[:SAMPLE_BYTES])
            packing.sampled(SAMPLE_BYTES, len(sample), time.perf_counter() - began)
        if packing is not None and packing.pays:
            began = time.perf_counter()
            packed = self._compress(block)
            if packing.packed(len(block), len(packed), time.perf_counter() - began):
                return packed, True
        return block, False

    def sent(self, plain: int, wire: int, took_s: float) -> None:
        if self._packing is not None:
            self._packing.sent(plain, wire, took_s)

    def _compress(self, block: memoryview) -> bytes:
        return self._compressor.compress(block)


def unpack_block(data: bytes | memoryview) -> bytes:
    """A compressed block, plain: at most BLOCK_BYTES; ConnectionBroken when there would be more, or none."""
    try:
        # what a frame promises is allocated before it is read: look at it first
        promised = zstandard.get_frame_parameters(data).content_size
        if not 0 < promised <= BLOCK_BYTES:
            raise ConnectionBroken(f"the peer sent a compressed block of {promised} bytes")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as exc:
        raise ConnectionBroken(f"the peer sent a block that cannot be decompressed: {exc}") from exc


def encode_block_length(length: int, packed: bool) -> bytes:
    return encode_length(length | _PACKED if packed else length)


def decode_block_length(head: bytes) -> tuple[int, bool]:
    """Length of such a block, and whether it is compressed; ConnectionBroken over ``MAX_BLOCK_BYTES``."""
    length = int.from_bytes(head, "big")
    packed = bool(length & _PACKED)
    return decode_length(encode_length(length & ~_PACKED), MAX_BLOCK_BYTES), packed


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


class Sealer:
    """Seals the blocks of one file, in their order. ConnectionBroken when ``key`` is none."""

    def __init__(self, key: bytes) -> None:
        self._cipher = _cipher(key)
        self._numbers = count()
        self._buffer = memoryview(bytearray(LENGTH_BYTES + MAX_BLOCK_BYTES + TAG_BYTES))

    def seal(self, block: memoryview | bytes, packed: bool = False) -> memoryview:
        """A block (``packed``: compressed, unlike others) as it goes on the wire; good until the next one."""
        sealed = self._buffer[: LENGTH_BYTES + len(block) + TAG_BYTES]
        sealed[:LENGTH_BYTES] = encode_block_length(len(block), packed)
        told = _TOLD_PACKED if packed else None
        self._cipher.encrypt_into(_nonce(next(self._numbers)), block, told, sealed[LENGTH_BYTES:])
        return sealed


class Opener:
    def __init__(self, key: bytes) -> None:
        self._cipher = _cipher(key)
        self._numbers = count()
        self._buffer = memoryview(bytearray(MAX_BLOCK_BYTES))

    def open(self, sealed: memoryview, packed: bool = False) -> memoryview:
        """The block behind its length; good until the next one. ConnectionBroken when another one was due."""
        block = self._buffer[: len(sealed) - TAG_BYTES]
        try:
            told = _TOLD_PACKED if packed else None
            self._cipher.decrypt_into(_nonce(next(self._numbers)), sealed, told, block)
        except InvalidTag as exc:
            raise ConnectionBroken("what came was altered on its way") from exc
        return block


def _cipher(key: bytes) -> AESGCM:
    if len(key) != KEY_BYTES:
        raise ConnectionBroken(f"the peer gave a key of {len(key)} bytes where one of {KEY_BYTES} was due")
    return AESGCM(key)


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "big")

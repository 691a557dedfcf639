"""How the bytes of a file cross a direct connection: in blocks sealed with AES-256-GCM, outside of TLS.

TLS proves who the two ends are and carries every word they say. It would cut a file into records of 16 KiB,
each copied through its own buffers and asked for from Python; sealed in blocks of a megabyte by the same
cipher, a file takes half of the processor time (``bench/bulk.py``), and that is the training's.

The receiver of a file makes a key for it and says it in ``Go``, within TLS: so it is as secret as the
handshake, and of that file on that connection alone. A block is its length (4 bytes, big-endian) and then
its sealed bytes with their tag of 16; whether it is compressed is sealed with it. The nonce is its number
(NIST SP 800-38D, section 8.2.1: no nonce comes twice under one key). Blocks that are altered, repeated, left
out or exchanged do not open; one that is missing at the end is missed by the file's length.
"""

from __future__ import annotations

import secrets
from itertools import count

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hypha.net.bulk.wire import LENGTH_BYTES, MAX_BLOCK_BYTES, ConnectionBroken, encode_block_length

KEY_BYTES = 32
TAG_BYTES = 16
_NONCE_BYTES = 12
#: Authenticated beside a block that is compressed.
_TOLD_PACKED = b"zstd"


def new_key() -> bytes:
    """For one file over one connection."""
    return secrets.token_bytes(KEY_BYTES)


class Sealer:
    """Seals the blocks of one file, in their order."""

    def __init__(self, key: bytes) -> None:
        """ConnectionBroken when ``key`` is none."""
        self._cipher = _cipher(key)
        self._numbers = count()
        self._buffer = memoryview(bytearray(LENGTH_BYTES + MAX_BLOCK_BYTES + TAG_BYTES))

    def seal(self, block: memoryview | bytes, packed: bool = False) -> memoryview:
        """A block of at most ``MAX_BLOCK_BYTES`` as it goes on the wire; good until the next one. ``packed``
        says that it alone of the others is compressed.
        """
        sealed = self._buffer[: LENGTH_BYTES + len(block) + TAG_BYTES]
        sealed[:LENGTH_BYTES] = encode_block_length(len(block), packed)
        told = _TOLD_PACKED if packed else None
        self._cipher.encrypt_into(_nonce(next(self._numbers)), block, told, sealed[LENGTH_BYTES:])
        return sealed


class Opener:
    """Opens them at the other end."""

    def __init__(self, key: bytes) -> None:
        self._cipher = _cipher(key)
        self._numbers = count()
        self._buffer = memoryview(bytearray(MAX_BLOCK_BYTES))

    def open(self, sealed: memoryview, packed: bool = False) -> memoryview:
        """The block behind its length; good until the next one. ConnectionBroken when it is not the one that
        is due, or was not sealed as ``packed``.
        """
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

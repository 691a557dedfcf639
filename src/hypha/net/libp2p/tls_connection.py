"""A libp2p connection inside of TLS: what is read and written of it, and who is at its other end.

:mod:`hypha.net.libp2p.mutual_tls` makes it, when both ends have proven who they are.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import PublicKey
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.peer.id import ID

from hypha.naming import cleaned
from hypha.net.peers.reasons import TurnedAway, refusal_in
from hypha.pki.contexts import asked_name_of

if TYPE_CHECKING:
    from multiaddr import Multiaddr

    from hypha.net.libp2p.mutual_tls import MutualTls
    from hypha.pki.identity import Vouched

#: How a node's number is written into the name that it asks for in the handshake.
INSTANCE_SUFFIX = ".instance.hypha"
#: A peer whose socket takes no byte for this long is dead, whatever else says so.
WRITE_STALL_S = 30.0
#: Ciphertext per receive: 4 KiB reads, as the library's own TLS does them, halve the throughput.
RECEIVE_BYTES = 256 * 1024
#: Plaintext of one record of TLS, at most.
RECORD_BYTES = 16 * 1024


async def close_at_once(raw: IRawConnection) -> None:
    """As :func:`trio.aclose_forcefully`, which knows no connection of libp2p."""
    with trio.CancelScope() as scope:
        scope.cancel()
        await raw.close()


@dataclass(frozen=True)
class TlsSession:
    """A TLS session whose handshake is over, and the ciphertext that it reads and writes."""

    tls: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO


class TlsConnection(ISecureConn):  # type: ignore[misc]
    """An authenticated connection. ``certificate`` is the peer's, DER; ``roles`` and ``name`` are from it,
    ``organization`` is the one that vouches for it. ``instance`` tells which node with that certificate has
    dialled; ``None`` where this node has, or where nothing was said.

    Writes are shielded from cancellation once a record has been started: half a record would corrupt
    every stream of the connection. Reads keep libp2p's contract: exactly ``n`` bytes unless the
    connection ends.
    """

    def __init__(
        self,
        raw: IRawConnection,
        session: TlsSession,
        security: MutualTls,
        certificate: bytes,
        vouched: Vouched,
    ) -> None:
        self.raw = raw
        tls = session.tls
        self.is_initiator = not tls.server_side
        self.certificate = certificate
        self.max_streams = security.max_streams
        self.budget = security.budget
        #: trio time at which the last bytes came in
        self.last_received = trio.current_time()
        #: and at which it was made
        self.since = self.last_received
        #: as it is written there, so that it can be compared; what follows is for people, too
        self.vouched = vouched
        self.roles = vouched.roles
        self.name = cleaned(vouched.name)
        self.organization = cleaned(vouched.organization)
        self.instance = instance_of(tls) if tls.server_side else None
        self._tls = tls
        self._incoming = session.incoming
        self._outgoing = session.outgoing
        self._key_pair = security.key_pair
        self._remote = ID.from_string(vouched.peer_id)
        self._buffer = bytearray()
        self._write_lock = trio.Lock()
        self._read_lock = trio.Lock()
        self._at_eof = False
        self._closed = False
        #: has the other end said anything that is no refusal?
        self._welcome = False

    def get_local_peer(self) -> ID:
        return ID.from_pubkey(self._key_pair.public_key)

    def get_local_private_key(self) -> Ed25519PrivateKey:
        return self._key_pair.private_key

    def get_remote_peer(self) -> ID:
        return self._remote

    def get_remote_public_key(self) -> PublicKey | None:
        return self._remote.extract_public_key()

    def get_remote_address(self) -> tuple[str, int] | None:
        address: tuple[str, int] | None = self.raw.get_remote_address()
        return address

    def get_transport_addresses(self) -> list[Multiaddr]:
        addresses: list[Multiaddr] = self.raw.get_transport_addresses()
        return addresses

    def get_connection_type(self) -> object:
        return self.raw.get_connection_type()

    async def write(self, data: bytes) -> None:
        """Send ``data`` whole. Waiting for other writers may be cancelled, sending may not."""
        async with self._write_lock:
            if self._closed:
                raise ConnectionClosedError("the TLS connection is closed", transport="tls")
            try:
                self._tls.write(data)
            except ssl.SSLError as exc:
                raise ConnectionClosedError(f"TLS write failed: {exc}", transport="tls") from exc
            await self._flush()

    async def _flush(self) -> None:
        with trio.move_on_after(WRITE_STALL_S, shield=True) as scope:
            await self.raw.write(self._outgoing.read())
        if scope.cancelled_caught:
            await self.abort()
            raise ConnectionClosedError(f"the peer took no data for {WRITE_STALL_S:g} s", transport="tls")

    async def read(self, n: int | None = None) -> bytes:
        """Exactly ``n`` bytes unless the connection ends; without ``n`` whatever there is."""
        if n == 0:
            return b""
        async with self._read_lock:
            while len(self._buffer) < (n or 1):
                if not await self._receive():
                    if not self._buffer:
                        raise ConnectionClosedError("the connection is closed", transport="tls")
                    break
            if not self._welcome:
                if (refusal := refusal_in(self._buffer)) is not None:
                    raise TurnedAway(refusal)
                self._welcome = True
            count = len(self._buffer) if n is None else n
            with memoryview(self._buffer) as view:
                taken = bytes(view[:count])
            del self._buffer[:count]
            return taken

    async def _receive(self) -> bool:
        """Append one receive's worth of plaintext; False at the end of the connection."""
        while not self._at_eof:
            received = self._decrypt()
            if self._outgoing.pending and not self._closed:  # a key update wants an answer
                async with self._write_lock:
                    await self._flush()
            if received:
                return True
            if self._at_eof:
                break
            ciphertext = await self.raw.read(RECEIVE_BYTES)
            if ciphertext:
                self.last_received = trio.current_time()
                self._incoming.write(ciphertext)
            else:
                self._incoming.write_eof()
        return False

    def _decrypt(self) -> int:
        before = len(self._buffer)
        try:
            while record := self._tls.read(RECORD_BYTES):
                self._buffer += record
            self._at_eof = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._at_eof = True
        except ssl.SSLError as exc:
            self._at_eof = True
            if len(self._buffer) == before:
                raise ConnectionClosedError(f"TLS error: {exc.reason or exc}", transport="tls") from exc
        return len(self._buffer) - before

    @property
    def pending_bytes(self) -> int:
        """Of plaintext that nobody has read."""
        return len(self._buffer)

    @property
    def ended(self) -> bool:
        return self._at_eof or self._closed

    async def close(self) -> None:
        """Say goodbye where the socket takes it within a second, then close."""
        if self._closed:
            return
        self._closed = True
        with suppress(ssl.SSLError, ValueError):  # no goodbye then; closing is all that matters
            self._tls.unwrap()
        farewell = self._outgoing.read()
        # A writer that hangs holds the lock, perhaps in the middle of a record: no goodbye then.
        if farewell and not self._write_lock.locked():
            with trio.move_on_after(1.0, shield=True), suppress(IOException, OSError):
                await self.raw.write(farewell)
        await self.raw.close()

    async def abort(self) -> None:
        """Close at once, without goodbye; whoever waits in a read or write gets an error."""
        self._closed = True
        await close_at_once(self.raw)


def instance_of(tls: ssl.SSLObject) -> str | None:
    """Which node has dialled, where it says so."""
    name = asked_name_of(tls) or ""
    return name.removesuffix(INSTANCE_SUFFIX) if name.endswith(INSTANCE_SUFFIX) else None

"""The one security transport a node offers: mutual TLS 1.3 with CA-signed Ed25519 certificates.

A connection exists only after both sides have shown a certificate that chains to the trust bundle, is
unexpired and unrevoked, and whose key *is* the PeerID. There is no plaintext, no other handshake, and no
session resumption (that would skip the revocation check). Both refusals and successes are told to the
caller as libp2p expects them (``HandshakeFailure``); the reason is logged here, once.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure

from hypha.errors import IdentityError
from hypha.naming import cleaned, learn
from hypha.net.libp2p.shared_port import TELL_AGAIN_S, level_of, take_place
from hypha.net.libp2p.yamux_reader import MAX_INBOUND_STREAMS
from hypha.net.peers.inbound_budget import InboundBudget
from hypha.net.peers.over_limit import OverLimit
from hypha.net.peers.reasons import NoPlace, failure_of, reason_of
from hypha.net.peers.refusals import BUSY, CERTIFICATE, Refusal, TurnedAway, encoded, refusal_in
from hypha.pki.certificates import common_name_of, parse_der, presented_chain
from hypha.pki.contexts import asked_name_of
from hypha.telemetry.instruments import CONNECTIONS_FAILED

if TYPE_CHECKING:
    from multiaddr import Multiaddr

    from hypha.pki.identity import Identity, Vouched

logger = logging.getLogger(__name__)

#: The multistream name that upstream's TLS uses too.
PROTOCOL_ID = TProtocol("/tls/1.0.0")
HANDSHAKE_TIMEOUT_S = 10.0
#: Who is turned away closes first, within this.
FAREWELL_S = 1.0
#: How a node's number is written into the name that it asks for in the handshake.
_INSTANCE_SUFFIX = ".instance.hypha"
#: Said to a peer whose certificate has no role.
NO_ROLE = "its certificate carries no role, and one is required there (`hypha-certutil renew --role ...`)"
#: A peer whose socket takes no byte for this long is dead, whatever else says so.
WRITE_STALL_S = 30.0
#: Ciphertext per receive: 4 KiB reads, as the library's own TLS does them, halve the throughput.
RECEIVE_BYTES = 256 * 1024


def key_pair_of(identity: Identity) -> KeyPair:
    """The certificate's key as libp2p wants it: so the PeerID is the certificate's."""
    private = Ed25519PrivateKey.from_bytes(identity.private_key.private_bytes_raw())
    return KeyPair(private, private.get_public_key())


class _Closing(trio.abc.AsyncResource):
    """Lets :func:`trio.aclose_forcefully` close a libp2p raw connection without waiting."""

    def __init__(self, raw: IRawConnection) -> None:
        self._raw = raw

    async def aclose(self) -> None:
        await self._raw.close()


class OtherPeer(HandshakeFailure):  # type: ignore[misc]
    """The certificate at that address is good, and of another peer than expected."""


class NotAdmitted(HandshakeFailure):  # type: ignore[misc]
    """The certificate is good, but this node does not let the peer in now."""


class _GaveUp(HandshakeFailure):  # type: ignore[misc]
    """The other end closed during the handshake, without an alert that says why."""


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
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        key_pair: KeyPair,
        certificate: bytes,
        vouched: Vouched,
    ) -> None:
        self.raw = raw
        self.is_initiator = not tls.server_side
        self.certificate = certificate
        #: streams that the peer may have open here at once
        self.max_streams = MAX_INBOUND_STREAMS
        #: trio time at which the last bytes came in
        self.last_received = trio.current_time()
        #: and at which it was made
        self.since = self.last_received
        #: what all connections of this node may take together
        self.budget: InboundBudget | None = None
        self.roles = vouched.roles
        self.name = cleaned(common_name_of(parse_der(certificate)))
        #: as it is written there, so that it can be compared
        self.vouched_organization = vouched.organization
        self.organization = cleaned(vouched.organization)
        self.instance = instance_of(tls) if tls.server_side else None
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._key_pair = key_pair
        self._remote_key = public_key_of(certificate)
        self._remote = ID.from_pubkey(self._remote_key)
        self._buffer = bytearray()
        self._consumed = 0
        self._scratch = memoryview(bytearray(RECEIVE_BYTES))
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

    def get_remote_public_key(self) -> Ed25519PublicKey:
        return self._remote_key

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
            while len(self._buffer) - self._consumed < (n or 1):
                del self._buffer[: self._consumed]
                self._consumed = 0
                if not await self._receive():
                    if not self._buffer:
                        raise ConnectionClosedError("the connection is closed", transport="tls")
                    break
            if not self._welcome:
                if (refusal := refusal_in(self._buffer)) is not None:
                    raise TurnedAway(refusal)
                self._welcome = True
            available = len(self._buffer) - self._consumed
            end = self._consumed + (available if n is None else min(n, available))
            with memoryview(self._buffer) as view:
                taken = bytes(view[self._consumed : end])
            if end == len(self._buffer):
                self._buffer.clear()
                self._consumed = 0
            else:
                self._consumed = end
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
        received = 0
        try:
            while True:
                count = self._tls.read(len(self._scratch), self._scratch)
                size = int(count)  # with a buffer given, ``read`` returns a length
                if size == 0:
                    self._at_eof = True
                    break
                self._buffer += self._scratch[:size]
                received += size
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._at_eof = True
        except ssl.SSLError as exc:
            self._at_eof = True
            if not received:
                raise ConnectionClosedError(f"TLS error: {exc.reason or exc}", transport="tls") from exc
        return received

    @property
    def pending_bytes(self) -> int:
        """Of plaintext that nobody has read."""
        return len(self._buffer) - self._consumed

    @property
    def ended(self) -> bool:
        """Whether either end has closed it."""
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
        await trio.aclose_forcefully(_Closing(self.raw))


def public_key_of(certificate: bytes) -> Ed25519PublicKey:
    """The libp2p public key of a DER certificate; ``HandshakeFailure`` when it is not Ed25519."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise HandshakeFailure("the peer's certificate key is not Ed25519")
    return Ed25519PublicKey.from_bytes(key.public_bytes_raw())


class MutualTls(ISecureTransport):  # type: ignore[misc]
    """Makes :class:`TlsConnection` of raw connections, or refuses."""

    def __init__(
        self,
        identity: Identity,
        require_roles: bool = False,
        instance: str | None = None,
        max_streams: int = MAX_INBOUND_STREAMS,
    ) -> None:
        self._identity = identity
        self._max_streams = max_streams
        self._require_roles = require_roles
        self._over_limit = OverLimit()
        self.budget = InboundBudget()
        self._asked_name = None if instance is None else instance + _INSTANCE_SUFFIX
        #: asked about each peer that has dialled and is let in otherwise
        self.admit: Callable[[TlsConnection], Awaitable[Refusal | None]] | None = None
        self.key_pair = key_pair_of(identity)

    def get_protocol_id(self) -> TProtocol:
        return PROTOCOL_ID

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return await self._secure(conn, server=True, expected=None)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return await self._secure(conn, server=False, expected=peer_id)

    async def secure_anybody(self, conn: IRawConnection) -> TlsConnection:
        """Outbound without knowing the PeerID (a gateway address without ``/p2p``)."""
        return await self._secure(conn, server=False, expected=None)

    async def _secure(self, raw: IRawConnection, server: bool, expected: ID | None) -> TlsConnection:
        place = _address(raw)  # asked for now: a closed socket does not know any more
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                return await self._handshake(raw, server, expected)
        except (ssl.SSLError, IOException, OSError, IdentityError, trio.TooSlowError) as exc:
            slow = isinstance(exc, trio.TooSlowError)
            reason = f"no end within {HANDSHAKE_TIMEOUT_S:g} s" if slow else reason_of(exc)
            self._count_refused(server, exc)
            # said first: closing may end the task that serves this connection
            logger.log(
                self._level_of(raw, str(expected or place), exc),
                "The mutual-TLS handshake with %s failed: %s.",
                expected or place,
                reason,
                extra={"peer_id": str(expected) if expected else None},
            )
            await trio.aclose_forcefully(_Closing(raw))
            raise HandshakeFailure(f"mutual TLS failed: {reason}") from exc
        except HandshakeFailure as exc:
            self._count_refused(server, exc)
            # whoever did not admit it has said so, and not for each of its attempts; and a node dials several
            # addresses at once, and gives up the others when one is there
            expected_here = isinstance(exc, NotAdmitted | NoPlace) or (server and isinstance(exc, _GaveUp))
            level = logging.DEBUG if expected_here else self._level_of(raw, str(expected or place), exc)
            logger.log(level, "Refused the connection with %s: %s.", place, exc)
            await trio.aclose_forcefully(_Closing(raw))
            raise
        except Exception as exc:  # a certificate that is odd in a way of its own
            self._count_refused(server, exc)
            logger.exception("The handshake with %s failed.", place)
            await trio.aclose_forcefully(_Closing(raw))
            raise HandshakeFailure(f"the handshake failed: {exc!r}") from exc

    async def _handshake(self, raw: IRawConnection, server: bool, expected: ID | None) -> TlsConnection:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = self._identity.server_context() if server else self._identity.client_context()
        asked = None if server else self._asked_name
        tls = context.wrap_bio(incoming, outgoing, server_side=server, server_hostname=asked)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                if outgoing.pending:
                    await raw.write(outgoing.read())
                received = await raw.read(RECEIVE_BYTES)
                if not received:
                    raise _GaveUp("the peer closed during the handshake") from None
                incoming.write(received)
            except ssl.SSLError:
                if outgoing.pending:  # the alert tells the other side why
                    await raw.write(outgoing.read())
                raise
        if outgoing.pending:
            await raw.write(outgoing.read())
        certificate = tls.getpeercert(binary_form=True)
        if not certificate:
            raise HandshakeFailure("the peer sent no certificate")
        try:
            vouched = self._identity.check(certificate, presented_chain(tls))
        except IdentityError as exc:
            if server:
                await _turn_away(raw, tls, outgoing, Refusal(CERTIFICATE, exc.problems[0].message))
            raise
        connection = TlsConnection(raw, tls, incoming, outgoing, self.key_pair, certificate, vouched)
        connection.budget = self.budget
        connection.max_streams = self._max_streams
        learn(str(connection.get_remote_peer()), connection.name)
        if expected is not None and connection.get_remote_peer() != expected:
            raise OtherPeer(
                f"expected peer {expected}, but the certificate there is of {connection.get_remote_peer()}"
            )
        if self._require_roles and not connection.roles:
            if server:
                await _turn_away(raw, tls, outgoing, Refusal(CERTIFICATE, NO_ROLE))
            raise HandshakeFailure(
                "the peer's certificate carries no role, and this node requires one (require_roles); its "
                "owner gives it one with `hypha-certutil renew --role ...`"
            )
        if server and self.admit is not None and (unwanted := await self.admit(connection)) is not None:
            await _turn_away(raw, tls, outgoing, unwanted)
            raise NotAdmitted(unwanted.code)
        if server and (crowded := take_place(raw, connection.get_remote_peer())) is not None:
            await _turn_away(raw, tls, outgoing, Refusal(BUSY, crowded))
            raise NoPlace(crowded)
        return connection

    def _level_of(self, raw: IRawConnection, who: str, exc: BaseException) -> int:
        """What this node dials again and again is a warning once a minute, as what dials it is."""
        failure = failure_of(exc)
        if self._over_limit.is_first(who, failure, TELL_AGAIN_S):
            return level_of(raw, failure)
        return logging.DEBUG

    @staticmethod
    def _count_refused(server: bool, exc: BaseException) -> None:
        """Count what was refused to those who dialled here; who dials counts for itself, once a peer."""
        if server:
            CONNECTIONS_FAILED.add(direction="inbound", reason=failure_of(exc))


async def _turn_away(
    raw: IRawConnection, tls: ssl.SSLObject, outgoing: ssl.MemoryBIO, refusal: Refusal
) -> None:
    """Tell the other end why, and wait a moment until it has closed: what it has sent meanwhile and nobody
    reads would turn our own closing into a reset, which may overtake what was said.
    """
    tls.write(encoded(refusal))
    await raw.write(outgoing.read())
    with trio.move_on_after(FAREWELL_S):
        while await raw.read(RECEIVE_BYTES):
            pass


def instance_of(tls: ssl.SSLObject) -> str | None:
    """Which node has dialled, where it says so."""
    name = asked_name_of(tls) or ""
    return name.removesuffix(_INSTANCE_SUFFIX) if name.endswith(_INSTANCE_SUFFIX) else None


def _address(raw: IRawConnection) -> str:
    address = raw.get_remote_address()
    return f"{address[0]}:{address[1]}" if address else "a relayed peer"

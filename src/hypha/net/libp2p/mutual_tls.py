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
from typing import TYPE_CHECKING

import trio
from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure

from hypha.errors import IdentityError
from hypha.naming import learn
from hypha.net.libp2p.shared_port import TELL_AGAIN_S, arrival_of
from hypha.net.libp2p.tls_connection import (
    INSTANCE_SUFFIX,
    RECEIVE_BYTES,
    TlsConnection,
    TlsSession,
    close_at_once,
)
from hypha.net.libp2p.yamux import MAX_INBOUND_STREAMS
from hypha.net.peers.inbound_limits import InboundBudget, OverLimit
from hypha.net.peers.reasons import BUSY, CERTIFICATE, NoPlace, Refusal, encoded, failure_of, reason_of
from hypha.pki.certificates import presented_chain
from hypha.telemetry.instruments import CONNECTIONS_FAILED

if TYPE_CHECKING:
    from hypha.pki.identity import Identity

logger = logging.getLogger(__name__)

#: The multistream name that upstream's TLS uses too.
PROTOCOL_ID = TProtocol("/tls/1.0.0")
HANDSHAKE_TIMEOUT_S = 10.0
#: Who is turned away closes first, within this.
FAREWELL_S = 1.0
#: Said to a peer whose certificate has no role.
NO_ROLE = "its certificate carries no role, and one is required there (`hypha-certutil renew --role ...`)"


class OtherPeer(HandshakeFailure):  # type: ignore[misc]
    """The certificate at that address is good, and of another peer than expected."""


class NotAdmitted(HandshakeFailure):  # type: ignore[misc]
    """The certificate is good, but this node does not let the peer in now."""


class _GaveUp(HandshakeFailure):  # type: ignore[misc]
    """The other end closed during the handshake, without an alert that says why."""


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
        #: streams that a peer may have open here at once, on one connection
        self.max_streams = max_streams
        self._require_roles = require_roles
        self._over_limit = OverLimit()
        #: what all connections of this node may take together
        self.budget = InboundBudget()
        self._asked_name = None if instance is None else instance + INSTANCE_SUFFIX
        #: asked about each peer that has dialled and is let in otherwise
        self.admit: Callable[[TlsConnection], Awaitable[Refusal | None]] | None = None
        private = Ed25519PrivateKey.from_bytes(identity.private_key.private_bytes_raw())
        #: the certificate's key as libp2p wants it: so the PeerID is the certificate's
        self.key_pair = KeyPair(private, private.get_public_key())

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
        except Exception as exc:  # a stranger's certificate may be odd in a way of its own
            if server:  # who dials counts for itself, once a peer
                CONNECTIONS_FAILED.add(direction="inbound", reason=failure_of(exc))
            # said first: closing may end the task that serves this connection
            failure = self._say_failed(raw, place, server, expected, exc)
            await close_at_once(raw)
            if failure is exc:
                raise
            raise failure from exc

    def _say_failed(
        self, raw: IRawConnection, place: str, server: bool, expected: ID | None, exc: Exception
    ) -> HandshakeFailure:
        """Log why, and return what to raise."""
        who = str(expected or place)
        if isinstance(exc, HandshakeFailure):
            # whoever did not admit it has said so, and not for each of its attempts; and a node dials several
            # addresses at once, and gives up the others when one is there
            expected_here = isinstance(exc, NotAdmitted | NoPlace) or (server and isinstance(exc, _GaveUp))
            level = logging.DEBUG if expected_here else self._level_of(raw, who, exc)
            logger.log(level, "Refused the connection with %s: %s.", place, exc)
            return exc
        if not isinstance(exc, ssl.SSLError | IOException | OSError | IdentityError | trio.TooSlowError):
            logger.exception("The handshake with %s failed.", place)
            return HandshakeFailure(f"the handshake failed: {exc!r}")
        slow = isinstance(exc, trio.TooSlowError)
        reason = f"no end within {HANDSHAKE_TIMEOUT_S:g} s" if slow else reason_of(exc)
        logger.log(
            self._level_of(raw, who, exc),
            "The mutual-TLS handshake with %s failed: %s.",
            who,
            reason,
            extra={"peer_id": str(expected) if expected else None},
        )
        return HandshakeFailure(f"mutual TLS failed: {reason}")

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
        session = TlsSession(tls, incoming, outgoing)
        connection = TlsConnection(raw, session, self, certificate, vouched)
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
        if (arrival := arrival_of(raw)) is None:
            return connection
        if (crowded := arrival.places.authenticate(arrival, str(connection.get_remote_peer()))) is not None:
            await _turn_away(raw, tls, outgoing, Refusal(BUSY, crowded))
            raise NoPlace(crowded)
        return connection

    def _level_of(self, raw: IRawConnection, who: str, exc: BaseException) -> int:
        """A warning once a minute of each way to fail: this node dials again and again, and anybody may dial
        it from one address without end.
        """
        arrival = arrival_of(raw)
        who = who if arrival is None else arrival.source
        is_first = self._over_limit.is_first(who, failure_of(exc), TELL_AGAIN_S)
        return logging.WARNING if is_first else logging.DEBUG


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


def _address(raw: IRawConnection) -> str:
    address = raw.get_remote_address()
    return f"{address[0]}:{address[1]}" if address else "a relayed peer"

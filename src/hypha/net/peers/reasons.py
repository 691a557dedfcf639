"""Why a connection could not be made: one reason in plain words, out of what the layers below raise.

A node that turns somebody away says why over the very connection that it closes. In TLS 1.3 whoever dials has
finished its handshake before the other end looks at its certificate: it would see a connection that closes,
and nothing else. So one line goes before the end, where the greeting of multistream is due, whose first byte
is another. A node that does not know such lines takes it for a broken greeting, and the connection fails as
it would have without.

Where one of the two refuses the other's certificate, nothing comes of dialling again before that has changed,
however often something here wants to reach the peer: :class:`ShutOut` has it wait.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.security.exceptions import HandshakeFailure
from libp2p.transport.exceptions import MuxerUpgradeFailure

from hypha.backoff import pause_after
from hypha.errors import IdentityError, PeerUnreachable
from hypha.naming import cleaned
from hypha.net.peers.inbound_limits import Recent

#: by OpenSSL's numbers (x509_vfy.h)
_VERIFY = {
    9: "its certificate is not valid yet; is this machine's clock right?",
    10: "its certificate has expired",
    **dict.fromkeys(
        (2, 18, 19, 20, 21), "its certificate is of a CA that is not in the trust bundle of this node"
    ),
}
#: the alerts by which the other end of TLS refuses a certificate, as OpenSSL names them
_ALERTS = {
    "UNKNOWN_CA": "the CA of this node's certificate is not in its trust bundle",
    "CERTIFICATE_EXPIRED": "this node's certificate has expired",
    "CERTIFICATE_REVOKED": "this node's certificate was revoked",
    "CERTIFICATE_REQUIRED": "it received no certificate of this node",
    "BAD_CERTIFICATE": "this node's certificate is not valid",
    "CERTIFICATE_UNKNOWN": "this node's certificate is not accepted",
}
_SYSTEM = {
    errno.ECONNREFUSED: "nothing listens there",
    errno.EHOSTUNREACH: "there is no route to it",
    errno.ENETUNREACH: "there is no route to it",
    errno.EADDRNOTAVAIL: "there is no route to it",
    errno.ETIMEDOUT: "it does not answer",
    errno.ECONNRESET: "it closed the connection",
}
#: it did not even begin as a node begins
_NO_GREETING = (MultiselectClientError, MultiselectCommunicatorError, ValueError)
NO_HYPHA_NODE = "what answers there is no Hypha node"
_MARK = b"hypha-refused "
_MAX_BYTES = 1000
#: what is shown of what the other end says
_MAX_DETAIL = 300
#: the certificate is not accepted, and why
CERTIFICATE = "certificate"
#: another node, at the address, uses the same certificate
SAME_CERTIFICATE = "same-certificate"
#: it has as many connections as it may, for now
BUSY = "busy"
FIRST_PAUSE_S = 1.0
#: of so many peers it is remembered; the oldest is forgotten first
MAX_REMEMBERED = 1000


class NoPlace(HandshakeFailure):  # type: ignore[misc]
    """The peer is who it says, and there is no place for one more connection of it."""


def root_of(exc: BaseException) -> BaseException:
    """What is at the bottom of the library's chain of wrappers, or the refusal on the way there."""
    while exc.__cause__ is not None and not isinstance(exc, TurnedAway | HandshakeFailure):
        exc = exc.__cause__
    if isinstance(exc, HandshakeFailure) and exc.__cause__ is not None:
        exc = exc.__cause__
    if isinstance(exc, ExceptionGroup):
        return root_of(exc.exceptions[0])
    return exc


def reason_of(exc: BaseException) -> str:
    """Why, in one sentence without its capital and its stop."""
    root = root_of(exc)
    if isinstance(root, TurnedAway):
        return str(root)
    if isinstance(root, ssl.SSLCertVerificationError):
        known = _VERIFY.get(root.verify_code)
        return known or f"its certificate is refused: {root.verify_message}"
    if isinstance(root, ssl.SSLError):
        reason = root.reason or str(root)
        told = next((words for alert, words in _ALERTS.items() if reason.endswith(f"ALERT_{alert}")), None)
        return f"the node there refuses this one: {told}" if told else f"{NO_HYPHA_NODE} ({reason})"
    if isinstance(root, IdentityError):
        return root.problems[0].message
    if isinstance(root, socket.gaierror):
        return f"the name has no address now ({root.strerror or root})"
    if isinstance(root, UnicodeError):
        return f"that is no host name ({root})"
    if isinstance(root, OSError) and root.strerror:
        words = _SYSTEM.get(root.errno or 0)
        return f"{words} ({os.strerror(root.errno or 0)})" if words else root.strerror
    chain = list(_chain(exc))
    if any(isinstance(one, MuxerUpgradeFailure) for one in chain):
        # a node of an older version, which says no more
        return "it closed the connection after the handshake: it may refuse this node's certificate"
    if any(isinstance(one, _NO_GREETING) for one in chain):
        return NO_HYPHA_NODE
    return (str(root) or type(root).__name__).splitlines()[0]


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__


def says_refused(exc: BaseException | None) -> bool:
    """Is "connection refused", the answer of a machine on which nobody listens, at the bottom of ``exc``?"""
    while exc is not None:
        if isinstance(exc, OSError) and exc.errno == errno.ECONNREFUSED:
            return True
        if isinstance(exc, ExceptionGroup):
            return all(says_refused(part) for part in exc.exceptions)
        exc = exc.__cause__
    return False


def failure_of(exc: BaseException) -> str:
    """Why a connection could not be made, in the words that it is counted by."""
    root = root_of(exc)
    if isinstance(root, trio.TooSlowError | TimeoutError):
        return "timeout"
    if isinstance(root, NoPlace) or (isinstance(root, TurnedAway) and root.refusal.code == BUSY):
        return "limit"
    if isinstance(root, TurnedAway) and root.refusal.code in (CERTIFICATE, SAME_CERTIFICATE):
        return "certificate"
    if isinstance(root, IdentityError | ssl.SSLError | HandshakeFailure):
        return "certificate"
    return "unreachable"


@dataclass(frozen=True)
class Refusal:
    """``detail`` is a sentence for :data:`CERTIFICATE`, an address for :data:`SAME_CERTIFICATE`."""

    code: str
    detail: str

    def __str__(self) -> str:
        if self.code == SAME_CERTIFICATE:
            return (
                f"another node uses the certificate of this one, at {self.detail}; make a certificate for "
                "each machine (`hypha-certutil node`)"
            )
        return f"the node there refuses this one: {self.detail or self.code}"


class TurnedAway(ConnectionClosedError):  # type: ignore[misc]
    """The other end has refused this node, and said why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal), transport="tls")
        self.refusal = refusal

    def __str__(self) -> str:
        return str(self.refusal)


def encoded(refusal: Refusal) -> bytes:
    """The line, short enough for one record of TLS."""
    detail = " ".join(refusal.detail.split()).encode("utf-8", "replace")
    return (_MARK + refusal.code.encode("ascii") + b" " + detail)[: _MAX_BYTES - 1] + b"\n"


def refusal_in(first: bytes | bytearray) -> Refusal | None:
    """What ``first``, the first bytes that came, says; ``None`` when the other end goes on as usual."""
    if not first.startswith(_MARK):
        return None
    line = bytes(first[len(_MARK) : _MAX_BYTES]).partition(b"\n")[0].decode("utf-8", "replace")
    code, _, detail = line.partition(" ")
    return Refusal(cleaned(code), cleaned(detail, _MAX_DETAIL))


@dataclass(frozen=True)
class _Pause:
    failure: str
    times: int
    until: float


class ShutOut:
    """Of one node; a pause takes ``longest_s`` at most."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._pauses: Recent[str, _Pause] = Recent(MAX_REMEMBERED)

    def note(self, peer: str, failure: str) -> None:
        """``peer`` was dialled in vain; ``failure`` says why."""
        earlier = self._pauses.get(peer)
        times = earlier.times + 1 if earlier else 0
        lasts_s = pause_after(times, FIRST_PAUSE_S, self._longest_s)
        self._pauses[peer] = _Pause(failure, times, trio.current_time() + lasts_s)

    def check(self, peer: str) -> None:
        """Raises PeerUnreachable, as the last time, while the pause of ``peer`` lasts."""
        pause = self._pauses.get(peer)
        if pause is not None and trio.current_time() < pause.until:
            raise PeerUnreachable(peer, pause.failure)

    def forget(self, peer: str) -> None:
        """``peer`` is connected."""
        self._pauses.pop(peer, None)

    def clear(self) -> None:
        """The node's certificate, or what it trusts, is another now."""
        self._pauses.clear()


def is_of_certificate(root: BaseException) -> bool:
    """Whether ``root``, at the bottom of a failed dial, is that one refuses the other's certificate."""
    if isinstance(root, TurnedAway):
        return root.refusal.code == CERTIFICATE
    return isinstance(root, IdentityError)

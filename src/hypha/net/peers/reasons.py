"""Why a connection could not be made: one reason in plain words, out of what the layers below raise."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Iterator

import trio
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.security.exceptions import HandshakeFailure
from libp2p.transport.exceptions import MuxerUpgradeFailure

from hypha.errors import IdentityError
from hypha.net.peers.refusals import BUSY, CERTIFICATE, SAME_CERTIFICATE, TurnedAway

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

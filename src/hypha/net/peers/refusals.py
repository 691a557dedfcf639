"""Why a node turns somebody away, said over the very connection that it closes.

In TLS 1.3 whoever dials has finished its handshake before the other end looks at its certificate: it would
see a connection that closes, and nothing else. So one line goes before the end, where the greeting of
multistream is due, whose first byte is another. A node that does not know such lines takes it for a broken
greeting, and the connection fails as it would have without.
"""

from __future__ import annotations

from dataclasses import dataclass

from libp2p.io.exceptions import ConnectionClosedError

from hypha.naming import cleaned

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

"""Whether a peer's role allows it to send or to take files of a kind (:data:`hypha.access.KINDS`)."""

from __future__ import annotations

from hypha.access import KINDS, NOBODY, Allowed, carries, may_act_as, named
from hypha.errors import PeerUnreachable, Refused
from hypha.net.bulk.wire import BulkConnections


def require_sender(links: BulkConnections, peer: str, kind: str) -> None:
    """Refused unless ``peer`` may send files of ``kind``."""
    allowed = KINDS[kind].senders if kind in KINDS else NOBODY
    _require(links, peer, allowed, f"files of kind {kind!r} come from a certificate with the role")


def require_receiver(links: BulkConnections, peer: str, kind: str, met: bool = True) -> None:
    """Refused unless ``peer`` may take files of ``kind``. Of one not ``met`` yet nothing need be known."""
    allowed = KINDS[kind].receivers if kind in KINDS else NOBODY
    _require(links, peer, allowed, f"files of kind {kind!r} go to a certificate with the role", met)


def _require(links: BulkConnections, peer: str, allowed: Allowed, what: str, met: bool = True) -> None:
    if peer == links.identity.peer_id:
        return
    try:
        has = links.roles_of(peer)
    except PeerUnreachable as exc:
        if not met:
            return
        raise Refused("role", f"{what} {named(allowed)}; that of {peer} is not known") from exc
    if not may_act_as(has, allowed):
        raise Refused("role", f"{what} {named(allowed)}; that of {peer} carries {carries(has)}")

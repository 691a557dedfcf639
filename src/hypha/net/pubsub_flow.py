"""Repairs to py-libp2p 0.8.1's pubsub, applied once to its modules when ``hypha.net`` is imported.

As shipped, every message carries the sender's signed peer record, and a message whose record is older
than the newest one seen is dropped whole: when a node's addresses change (a relay reservation is enough)
two messages may overtake each other between threads of work, and a subscription, a graft or a request
for workers is lost without a word. Who sent a message is proven by the connection already, and addresses
travel in our own messages, so the records are left out and passed over. That also saves a signature and
its verification a message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub, pubsub
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub


def _no_record(host: Any) -> tuple[bytes, bool]:
    return b"", False


def _pass_over(message: Any, host: Any, peer_id: Any) -> bool:
    return True


class Router(GossipSub):  # type: ignore[misc]
    """Gossipsub that announces no IDONTWANT: they are for messages of kilobytes that come by many ways;
    ours are small and nearly all leaves have one gateway, so they would only double the traffic.
    """

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Any) -> None:
        return


class Company(Pubsub):  # type: ignore[misc]
    """Pubsub with those peers only that ``concerns`` names, by PeerID.

    The library's speaks it with every peer: a scheduler that twenty workers connect to would open twenty
    streams, be grafted into twenty meshes and repeat to each its request of a moment ago.
    """

    def __init__(self, host: Any, router: Router, concerns: Callable[[str], bool]) -> None:
        super().__init__(host, router, strict_signing=True)
        self._concerns = concerns

    async def _handle_new_peer(self, peer_id: ID) -> None:
        if self._concerns(str(peer_id)):
            await super()._handle_new_peer(peer_id)


def install() -> None:
    """Replace the functions; calling it again changes nothing."""
    for module in (gossipsub, pubsub):
        module.env_to_send_in_RPC = _no_record
        module.maybe_consume_signed_record = _pass_over

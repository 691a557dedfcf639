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
from contextvars import ContextVar
from typing import Any

from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub, pubsub
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub

#: How many messages are remembered by who passed them on, until somebody asks.
REMEMBERED = 1024

#: the peer from which this task got the message that it handles
_forwarder: ContextVar[str] = ContextVar("forwarder of a message")
#: to whom this task has passed a message on
_receivers: ContextVar[set[str] | None] = ContextVar("receivers of a message", default=None)


def _no_record(host: Any) -> tuple[bytes, bool]:
    return b"", False


def _pass_over(message: Any, host: Any, peer_id: Any) -> bool:
    return True


class Router(GossipSub):  # type: ignore[misc]
    """Gossipsub that announces no IDONTWANT: they are for messages of kilobytes that come by many ways;
    ours are small and nearly all leaves have one gateway, so they would only double the traffic.
    """

    #: ``begin(message, forwarder)`` is called before a message of somebody else is passed on; what it
    #: returns, afterwards, with the peers who got it
    begin_relaying: Callable[[Any, str], Callable[[set[str]], None]] | None = None

    async def _emit_idontwant_for_message(self, msg_id: bytes, topic_ids: Any) -> None:
        return

    async def publish(self, msg_forwarder: ID, pubsub_msg: Any) -> None:
        if self.begin_relaying is None or self.pubsub is None or msg_forwarder == self.pubsub.my_id:
            await super().publish(msg_forwarder, pubsub_msg)
            return
        done = self.begin_relaying(pubsub_msg, str(msg_forwarder))
        receivers: set[str] = set()
        token = _receivers.set(receivers)
        try:
            await super().publish(msg_forwarder, pubsub_msg)
        finally:
            _receivers.reset(token)
            done(receivers)

    def send_rpc(self, peer_id: ID, rpc: Any, priority: bool = False) -> None:
        super().send_rpc(peer_id, rpc, priority)
        receivers = _receivers.get()
        if receivers is not None and rpc.publish:
            receivers.add(str(peer_id))


class Company(Pubsub):  # type: ignore[misc]
    """Pubsub with those peers only that ``concerns`` names, by PeerID.

    The library's speaks it with every peer: a scheduler that twenty workers connect to would open twenty
    streams, be grafted into twenty meshes and repeat to each its request of a moment ago.
    """

    def __init__(self, host: Any, router: Router, concerns: Callable[[str], bool]) -> None:
        super().__init__(host, router, strict_signing=True)
        self._concerns = concerns
        self._forwarders: dict[tuple[bytes, bytes], str] = {}
        #: to whom a stream is being opened: a second one would take the place of the first
        self._opening: set[ID] = set()

    async def _handle_new_peer(self, peer_id: ID) -> None:
        if peer_id in self._opening or not self._concerns(str(peer_id)):
            return
        self._opening.add(peer_id)
        try:
            await super()._handle_new_peer(peer_id)
        finally:
            self._opening.discard(peer_id)

    async def include(self, peer_id: ID) -> None:
        """Speak pubsub with a peer that ``concerns`` names by now, and did not when it was connected. Returns
        once that is so, or the peer is gone.
        """
        await self._handle_new_peer_with_retry(peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        token = _forwarder.set(str(msg_forwarder))
        try:
            await super().push_msg(msg_forwarder, msg)
        finally:
            _forwarder.reset(token)

    def notify_subscriptions(self, publish_message: Any) -> None:
        # the library's subscription does not tell from whom a message came
        self._forwarders[publish_message.from_id, publish_message.seqno] = _forwarder.get()
        if len(self._forwarders) > REMEMBERED:
            del self._forwarders[next(iter(self._forwarders))]
        super().notify_subscriptions(publish_message)

    def forwarder_of(self, message: Any) -> str | None:
        """Who passed on ``message``, which a subscription has just given; to be asked once."""
        return self._forwarders.pop((message.from_id, message.seqno), None)


def install() -> None:
    """Replace the functions; calling it again changes nothing."""
    for module in (gossipsub, pubsub):
        module.env_to_send_in_RPC = _no_record
        module.maybe_consume_signed_record = _pass_over

"""Repairs to py-libp2p 0.8.1's pubsub, applied once to its modules when ``hypha.net`` is imported.

As shipped, every message carries the sender's signed peer record, and a message whose record is older
than the newest one seen is dropped whole: when a node's addresses change (a relay reservation is enough)
two messages may overtake each other between threads of work, and a subscription, a graft or a request
for workers is lost without a word. Who sent a message is proven by the connection already, and addresses
travel in our own messages, so the records are left out and passed over. That also saves a signature and
its verification a message.

As shipped, too, a message with a topic that is no UTF-8, or with a key that is none, is an error in a task of
the service, and so the end of the node; and a PRUNE may name others, who are dialled while its sender's next
message waits. Here such an error ends the stream of whom it came from, and nobody is dialled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.pubsub import gossipsub, pubsub
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub

from hypha.errors import Undecodable
from hypha.net.libp2p.protobuf_messages import MAX_PEER_ID_BYTES
from hypha.net.libp2p.streams import discard
from hypha.net.peers.inbound_limits import Recent

logger = logging.getLogger(__name__)

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

    async def heartbeat(self) -> None:
        while True:
            try:
                await super().heartbeat()
            except Exception:  # the edge of a service loop: what peers left in its tables must not end it
                logger.exception("The gossip mesh could not be looked after; it is tried again.")
                await trio.sleep(self.heartbeat_interval)

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        try:
            await super().on_peer_subscribed(peer_id, topic)
        except Exception:  # the edge of a task that the library starts for a peer
            logger.exception("A peer could not be added to the gossip mesh.", extra={"peer_id": str(peer_id)})

    async def flush_pending_messages(self, peer_id: ID) -> None:
        try:
            await super().flush_pending_messages(peer_id)
        except Exception:  # as above
            logger.exception("What waited for a peer could not be sent.", extra={"peer_id": str(peer_id)})

    async def _do_px(self, px_peers: Any) -> None:
        return

    def send_rpc(self, peer_id: ID, rpc: Any, priority: bool = False) -> None:
        super().send_rpc(peer_id, rpc, priority)
        receivers = _receivers.get()
        if receivers is not None and rpc.publish:
            receivers.add(str(peer_id))


class ScopedPubsub(Pubsub):  # type: ignore[misc]
    """Pubsub with those peers only that ``concerns`` names, by PeerID.

    The library's speaks it with every peer: a scheduler that twenty workers connect to would open twenty
    streams, be grafted into twenty meshes and repeat to each its request of a moment ago.
    """

    def __init__(self, host: Any, router: Router, concerns: Callable[[str], bool]) -> None:
        super().__init__(host, router, strict_signing=True)
        self._concerns = concerns
        self._forwarders: Recent[tuple[bytes, bytes], str] = Recent(REMEMBERED)
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
        """Speak pubsub with a peer that ``concerns`` names by now; returns once that is so, or it is gone."""
        await self._handle_new_peer_with_retry(peer_id)

    async def stream_handler(self, stream: Any) -> None:
        peer_id = stream.muxed_conn.peer_id
        if not self._concerns(str(peer_id)):
            logger.debug("Gossip of a stranger is not heard.", extra={"peer_id": str(peer_id)})
            await discard(stream)
            return
        try:
            await super().stream_handler(stream)
        except Exception as exc:  # noqa: BLE001 - the edge of a peer's stream, whatever its bytes did
            logger.warning("A gossip stream is reset: %r", exc, extra={"peer_id": str(peer_id)})
            await discard(stream)
            self._handle_dead_peer(peer_id)

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        token = _forwarder.set(str(msg_forwarder))
        try:
            if len(msg.from_id) > MAX_PEER_ID_BYTES:
                raise Undecodable(f"its publisher would have an identifier of {len(msg.from_id)} bytes")
            await super().push_msg(msg_forwarder, msg)
        except Exception as exc:  # a task of the library's service, which would end with it
            if msg_forwarder == self.my_id:
                raise
            # it came with others on one stream: that goes on
            logger.warning("A gossip message is dropped: %r", exc, extra={"peer_id": str(msg_forwarder)})
        finally:
            _forwarder.reset(token)

    def notify_subscriptions(self, publish_message: Any) -> None:
        # the library's subscription does not tell from whom a message came
        self._forwarders[publish_message.from_id, publish_message.seqno] = _forwarder.get()
        super().notify_subscriptions(publish_message)

    def forwarder_of(self, message: Any) -> str | None:
        """Who passed on ``message``, which a subscription has just given; to be asked once."""
        return self._forwarders.pop((message.from_id, message.seqno), None)


def install() -> None:
    """Replace the functions; calling it again changes nothing."""
    for module in (gossipsub, pubsub):
        module.env_to_send_in_RPC = _no_record
        module.maybe_consume_signed_record = _pass_over

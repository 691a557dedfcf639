"""The gossip topic on which schedulers ask for workers.

Every node is subscribed and drains at once (the library's queue holds 32 and then drops); gateways
forward, and a leaf that has gateways gossips with them alone. The settings were measured: the library's
defaults isolate leaves of a hub for good, its rate limit drops silently, and its adaptive mode stretches
the heartbeat to a minute.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12
from libp2p.tools.anyio_service import background_trio_service

from hypha.messages import WIRE_VERSION, WORKER_TOPIC, GossipEnvelope, WorkerRequest
from hypha.net import pubsub_flow
from hypha.net.rpc import traceparent
from hypha.node import Heard

logger = logging.getLogger(__name__)

#: Messages a slow subscriber may leave unread; the oldest go first.
BACKLOG = 256
#: How long :meth:`Gossip.publish` waits for somebody to publish to.
MESH_WAIT_S = 3.0

_decoder = msgspec.msgpack.Decoder(GossipEnvelope)


class Gossip:
    """Publishes and hears :class:`WorkerRequest`; ``gateways`` says who is worth waiting for,
    ``concerns`` with whom gossip is exchanged at all.
    """

    def __init__(self, host: Any, gateways: Callable[[], list[str]], concerns: Callable[[str], bool]) -> None:
        self._gateways = gateways
        pubsub_flow.install()
        self._router = pubsub_flow.Router(
            protocols=[PROTOCOL_ID_V12],
            degree=128,
            degree_low=1,
            degree_high=256,
            heartbeat_interval=1,
            adaptive_gossip_enabled=False,
            max_messages_per_topic_per_second=1000,
        )
        self._pubsub = pubsub_flow.Company(host, self._router, concerns)
        # message numbers of a restarted node must not repeat those its peers still remember
        self._pubsub.counter = time.time_ns()
        self._listeners: set[tuple[trio.MemorySendChannel[Heard], trio.MemoryReceiveChannel[Heard]]] = set()

    async def start(self, stack: AsyncExitStack, nursery: trio.Nursery) -> None:
        """Run until ``stack`` is unwound."""
        await stack.enter_async_context(background_trio_service(self._pubsub))
        await stack.enter_async_context(background_trio_service(self._router))
        await self._pubsub.wait_until_ready()
        subscription = await self._pubsub.subscribe(WORKER_TOPIC)
        nursery.start_soon(self._drain, subscription)

    def close(self) -> None:
        """End the library's thread that forgets old message numbers; nobody else would."""
        self._pubsub.seen_messages.stop()

    async def publish(self, message: WorkerRequest) -> None:
        """Tell everybody. Waits a moment for the mesh; without one the message reaches nobody."""
        await self._wait_for_mesh()
        envelope = GossipEnvelope(body=message, traceparent=traceparent())
        await self._pubsub.publish(WORKER_TOPIC, msgspec.msgpack.encode(envelope))

    async def _wait_for_mesh(self) -> None:
        with trio.move_on_after(MESH_WAIT_S) as scope:
            while True:
                mesh = self._router.mesh.get(WORKER_TOPIC, set())
                gateways = self._gateways()
                if any(ID.from_string(one) in mesh for one in gateways) or (mesh and not gateways):
                    return
                # the library has an event for one peer's joining only; gateways come and go
                await trio.sleep(0.02)
        if scope.cancelled_caught:
            logger.warning("Nobody is there to pass a worker request on; it is published all the same.")

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[trio.MemoryReceiveChannel[Heard]]:
        """A channel of (publisher, message), from now on; for a slow reader the oldest are dropped."""
        channel = trio.open_memory_channel[Heard](BACKLOG)
        self._listeners.add(channel)
        try:
            async with channel[1]:
                yield channel[1]
        finally:
            self._listeners.discard(channel)
            channel[0].close()

    async def _drain(self, subscription: Any) -> None:
        own = self._pubsub.my_id
        while True:
            raw = await subscription.get()
            publisher = ID(raw.from_id)
            if publisher == own:
                continue
            try:
                envelope = _decoder.decode(raw.data)
            except msgspec.MsgspecError as exc:
                logger.warning("A gossip message does not decode: %s", exc, extra={"peer_id": str(publisher)})
                continue
            if envelope.v != WIRE_VERSION:
                logger.warning(
                    "A gossip message has version %d.", envelope.v, extra={"peer_id": str(publisher)}
                )
                continue
            if envelope.body.scheduler.peer != str(publisher):
                logger.warning(
                    "A worker request names another scheduler than its publisher; it is dropped.",
                    extra={"peer_id": str(publisher)},
                )
                continue
            for send, receive in self._listeners:
                _put(send, receive, (str(publisher), envelope.body))


def _put(
    send: trio.MemorySendChannel[Heard], receive: trio.MemoryReceiveChannel[Heard], heard: Heard
) -> None:
    try:
        send.send_nowait(heard)
    except trio.WouldBlock:
        receive.receive_nowait()  # this very moment full, so there is an oldest one
        send.send_nowait(heard)
    except trio.BrokenResourceError:
        logger.debug("A listener has just left.")

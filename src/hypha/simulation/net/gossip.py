"""Gossip of a simulated node: requests for workers, which gateways pass on to all of their peers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from hypha.access import TOPICS
from hypha.messages import WORKER_TOPIC, GossipEnvelope, WorkerRequest
from hypha.node import PublishedRequest

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

logger = logging.getLogger("hypha.simulation")

#: as in hypha.net.discovery.gossip and hypha.net.options.Timings
_BACKLOG = 256
_MESH_WAIT_S = 3.0

_gossip = msgspec.msgpack.Decoder(GossipEnvelope)


class SimulatedGossip:
    """Of one node."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._listeners: dict[trio.MemorySendChannel[PublishedRequest], None] = {}

    async def publish(self, message: WorkerRequest) -> None:
        """Ask everybody for workers; waits a moment for a gateway to pass it on."""
        with trio.move_on_after(_MESH_WAIT_S):
            while self._node.gateway is None:
                await self._node.gateway_changed.wait()
        network = self._node.network
        payload = msgspec.msgpack.encode(GossipEnvelope(body=message))
        for gateway in self._node.connected_gateways():
            network.start(partial(self._pass_on, gateway, self._node.peer_id, payload, {self._node.peer_id}))

    async def _pass_on(self, to: str, publisher: str, payload: bytes, seen: set[str]) -> None:
        """To one peer, and from a gateway to all of its peers; lost where there is no connection."""
        network = self._node.network
        connection = network.connection(self._node.peer_id, to)
        if connection is None or to in seen:
            return
        seen.add(to)
        with trio.move_on_after(10.0) as scope:
            await self._node.network.carry(
                self._node.network.hops(connection, self._node.peer_id), len(payload)
            )
        target = network.nodes.get(to)
        if scope.cancelled_caught or target is None:
            return
        target.process.spawn(target.gossip.take, publisher, payload, seen)

    async def take(self, publisher: str, payload: bytes, seen: set[str]) -> None:
        """A message that has arrived, in the process of this node."""
        if not self._node.may(publisher, TOPICS[WORKER_TOPIC].by):
            return
        if self._node.options.hop:
            network = self._node.network
            for connection in network.connections_of(self._node.peer_id):
                to = connection.other(self._node.peer_id)
                network.start(partial(self._pass_on, to, publisher, payload, seen))
            return
        message = _gossip.decode(payload).body
        for channel in list(self._listeners):
            put_nowait(channel, PublishedRequest(publisher, message))

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[trio.MemoryReceiveChannel[PublishedRequest]]:
        """A channel of :class:`hypha.node.PublishedRequest`."""
        send, receive = trio.open_memory_channel[PublishedRequest](_BACKLOG)
        self._listeners[send] = None
        try:
            yield receive
        finally:
            self._listeners.pop(send, None)
            send.close()


def put_nowait(channel: trio.MemorySendChannel[Any], item: object) -> None:
    """Into a channel whose reader may be slow, or gone."""
    try:
        channel.send_nowait(item)
    except (trio.WouldBlock, trio.BrokenResourceError):
        logger.warning("A slow listener misses something.")

"""The gossip topic on which schedulers ask for workers.

Every node is subscribed and drains at once (the library's queue holds 32 and then drops); gateways
forward, and a leaf that has gateways gossips with them alone. The settings were measured: the library's
defaults isolate leaves of a hub for good, its rate limit drops silently, and its adaptive mode stretches
the heartbeat to a minute.

A message's signature proves its publisher's key. What that key may do (:data:`hypha.access.TOPICS`) is in its
certificate, which comes with the message.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import msgspec
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V12
from libp2p.tools.anyio_service import background_trio_service
from msgspec import Struct
from opentelemetry.trace import SpanKind

from hypha.access import TOPICS, carries, may_act_as, named
from hypha.config.tuning import GossipTuning
from hypha.decoding import decode
from hypha.errors import IdentityError, Undecodable
from hypha.messages import MAX_CERTIFICATES, WIRE_VERSION, WORKER_TOPIC, GossipEnvelope, WorkerRequest
from hypha.messages.envelopes import CertificateChain
from hypha.naming import shown
from hypha.net.libp2p import pubsub
from hypha.net.peers.inbound_limits import OverLimit
from hypha.node import Listeners, PublishedRequest
from hypha.pki.identity import Identity
from hypha.telemetry.instruments import GOSSIP_MESSAGES
from hypha.tracing import hop_traceparent, span, start_span, traceparent
from hypha.tracing.operations import GOSSIP_PUBLISH, GOSSIP_RECEIVE, GOSSIP_RELAY

logger = logging.getLogger(__name__)

#: Messages a slow subscriber may leave unread; the oldest go first.
BACKLOG = 256
#: How long :meth:`Gossip.publish` waits for somebody to publish to.
MESH_WAIT_S = 3.0
#: A request with its publisher's certificates has some kilobytes. Pubsub keeps the messages of the last
#: seconds, and a thousand more, so that it can give them out again.
MAX_MESSAGE_BYTES = 32 << 10

_decoder = msgspec.msgpack.Decoder(GossipEnvelope)


class Gossip:
    """Publishes and hears :class:`WorkerRequest`; ``gateways`` says who is worth waiting for,
    ``concerns`` with whom gossip is exchanged at all; ``identity`` judges who may publish, by the certificate
    that comes with a message.
    """

    def __init__(
        self,
        host: Any,
        gateways: Callable[[], list[str]],
        concerns: Callable[[str], bool],
        identity: Identity,
        require_roles: bool,
        mesh: GossipTuning,
    ) -> None:
        self._gateways = gateways
        self._identity = identity
        self._require_roles = require_roles
        self._over_limit = OverLimit()
        pubsub.install()
        self._router = pubsub.Router(
            protocols=[PROTOCOL_ID_V12],
            degree=mesh.degree,
            degree_low=mesh.degree_low,
            degree_high=mesh.degree_high,
            heartbeat_interval=mesh.heartbeat_s,
            adaptive_gossip_enabled=False,
            max_messages_per_topic_per_second=1000,
        )
        self._router.begin_relaying = self._begin_relaying
        self._pubsub = pubsub.ScopedPubsub(host, self._router, concerns)
        self._pubsub.set_topic_validator(WORKER_TOPIC, self._may_publish, False)
        # message numbers of a restarted node must not repeat those its peers still remember
        self._pubsub.counter = time.time_ns()
        self._listeners = Listeners[PublishedRequest](BACKLOG, lambda: GOSSIP_MESSAGES.add(event="dropped"))
        self.subscribe = self._listeners.listen

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

    async def include(self, peer: str) -> None:
        """Exchange gossip with ``peer``, a gateway that is in use from now on.

        Which peer is at a gateway's address is known once it was dialled. When something else has connected
        this node with it before (a circuit through it is enough), pubsub took it for nobody's concern.
        """
        await self._pubsub.include(ID.from_string(peer))

    async def publish(self, message: WorkerRequest) -> None:
        """Tell everybody. Waits a moment for the mesh; without one the message reaches nobody."""
        with span(GOSSIP_PUBLISH, _attributes("send"), kind=SpanKind.PRODUCER):
            await self._wait_for_mesh()
            envelope = GossipEnvelope(
                body=message,
                traceparent=traceparent(),
                certificates=self._identity.certificates[:MAX_CERTIFICATES],
            )
            await self._pubsub.publish(WORKER_TOPIC, msgspec.msgpack.encode(envelope))
        GOSSIP_MESSAGES.add(event="published")
        logger.debug("Published request %s for workers.", message.request_id)

    @property
    def mesh_size(self) -> int:
        """Peers to which messages are passed on."""
        return len(self._router.mesh.get(WORKER_TOPIC, ()))

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

    def _may_publish(self, forwarder: ID, raw: Any) -> bool:
        """What the library asks, once for each message, before it is passed on or taken."""
        publisher = ID(raw.from_id)
        if publisher == self._pubsub.my_id:
            return True
        if len(raw.data) > MAX_MESSAGE_BYTES or self._refused(str(publisher), raw.data):
            GOSSIP_MESSAGES.add(event="dropped")
            return False
        return True

    def _refused(self, publisher: str, message: bytes) -> bool:
        """Whether ``message``, which ``publisher`` has signed, is to be dropped, which is logged once."""
        problem = self._problem(publisher, message)
        if problem is None:
            return False
        level = logging.WARNING if self._over_limit.is_first(publisher, WORKER_TOPIC) else logging.DEBUG
        text = "Dropped what %s has published: %s."
        logger.log(level, text, shown(publisher), problem, extra={"peer_id": publisher})
        return True

    def _problem(self, publisher: str, message: bytes) -> str | None:
        certificates: CertificateChain = ()
        with suppress(Undecodable):
            certificates = decode(_certified.decode, message).certificates
        if not certificates:
            return "no certificate is with it"
        try:
            vouched = self._identity.check(certificates[0], certificates[1:])
        except IdentityError as exc:
            return exc.problems[0].message
        if vouched.peer_id != publisher:
            return "the certificate with it is of another peer"
        if not vouched.roles and self._require_roles:
            return "its certificate carries no role, and one is required here"
        allowed = TOPICS[WORKER_TOPIC].by
        if not may_act_as(vouched.roles, allowed):
            has = carries(vouched.roles)
            return f"{WORKER_TOPIC} is for {named(allowed)}, and its certificate carries {has}"
        return None

    async def _drain(self, subscription: Any) -> None:
        while True:
            raw = await subscription.get()
            try:
                self._hear(raw)
            except Exception:  # the edge of a service loop: what one peer published must not end it
                GOSSIP_MESSAGES.add(event="dropped")
                logger.exception("A gossip message could not be taken.")

    def _hear(self, raw: Any) -> None:
        if ID(raw.from_id) == self._pubsub.my_id:
            return
        # who it is has been proven by the signature
        publisher = str(ID(raw.from_id))
        try:
            envelope = decode(_decoder.decode, raw.data)
        except Undecodable as exc:
            return _drop(publisher, f"A gossip message does not decode: {exc}")
        if envelope.v != WIRE_VERSION:
            return _drop(publisher, f"A gossip message has version {envelope.v}.")
        if envelope.body.scheduler.peer != publisher:
            text = "A worker request names another scheduler than its publisher; it is dropped."
            return _drop(publisher, text)
        GOSSIP_MESSAGES.add(event="received")
        request = envelope.body
        logger.debug("Request %s for workers arrived.", request.request_id, extra={"peer_id": publisher})
        if not self._listeners:
            return
        attributes = {**_attributes("receive"), "hypha.peer": publisher}
        parent = _passed_on(envelope.traceparent, publisher, self._pubsub.forwarder_of(raw))
        with span(GOSSIP_RECEIVE, attributes, kind=SpanKind.CONSUMER, parent=parent):
            self._listeners.tell(PublishedRequest(publisher, request, traceparent()))

    def _begin_relaying(self, raw: Any, forwarder: str) -> Callable[[set[str]], None]:
        """A message of somebody else is about to be passed on."""
        publisher = str(ID(raw.from_id))
        try:
            sent_in = decode(_decoder.decode, raw.data).traceparent
        except Undecodable:
            sent_in = None  # whoever takes it says so
        relaying = start_span(
            GOSSIP_RELAY,
            {**_attributes("send"), "hypha.peer": publisher},
            kind=SpanKind.PRODUCER,
            parent=_passed_on(sent_in, publisher, forwarder),
            identity=_hop(sent_in, str(self._pubsub.my_id)),
        )

        def done(receivers: set[str]) -> None:
            if not receivers:
                return  # a span that never ends is never seen: nothing was passed on
            GOSSIP_MESSAGES.add(event="relayed")
            relaying.set_attribute("hypha.receivers", len(receivers))
            relaying.end()
            logger.debug(
                "Passed a request for workers on to %d peers.", len(receivers), extra={"peer_id": publisher}
            )

        return done


def _drop(publisher: str, why: str) -> None:
    GOSSIP_MESSAGES.add(event="dropped")
    logger.warning("%s", why, extra={"peer_id": publisher})


def _attributes(operation: str) -> dict[str, str]:
    return {"messaging.operation.name": operation, "messaging.destination.name": WORKER_TOPIC}


def _passed_on(sent_in: str | None, publisher: str, forwarder: str | None) -> str | None:
    """The ``traceparent`` of the operation by which a message came here: its publication, or its relay."""
    if forwarder is None or forwarder == publisher:
        return sent_in
    return _hop(sent_in, forwarder)


def _hop(sent_in: str | None, peer: str) -> str | None:
    """As :func:`hop_traceparent`, of what a peer has sent; None where that is no ``traceparent``."""
    try:
        return hop_traceparent(sent_in, peer) if sent_in else None
    except ValueError:
        return None


class _Certified(Struct):
    """What of a message says who publishes it, whatever its version and its body."""

    certificates: CertificateChain = ()


_certified = msgspec.msgpack.Decoder(_Certified)

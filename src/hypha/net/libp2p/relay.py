"""Circuit relay v2: a gateway splices streams for peers that nobody can dial; both ends speak TLS
through it, so the relay sees ciphertext only.

The wire is the library's (its protobufs), the behaviour is ours: as shipped, circuits are kept by PeerID,
so closing one circuit to a peer cuts the peer's other circuits, and a killed source's circuit lingers.
Here each circuit owns its two streams and nothing else. Reservations live on the monotonic clock and end
with their peer's connection.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.abc import ConnectionType, IRawConnection
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Reservation, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as CircuitPeer
from libp2p.relay.circuit_v2.protocol_buffer import StatusCode, to_proto_status
from libp2p.relay.circuit_v2.utils import write_delimited_msg
from multiaddr import Multiaddr

from hypha.access import HOP_PROTOCOL as HOP
from hypha.access import STOP_PROTOCOL as STOP
from hypha.config.reading.log_filter import TRACE
from hypha.errors import NetworkError, PeerUnreachable, Undecodable
from hypha.net.bandwidth import Caps
from hypha.net.libp2p.protobuf_messages import (
    MAX_RELAY_BYTES,
    add_traceparent,
    peer_id_in,
    read_message,
    traceparent_of,
)
from hypha.net.libp2p.streams import STREAM_ERRORS, Streams, discard, reset_on_error
from hypha.net.options import RelayLimits
from hypha.net.peers.inbound_limits import OverLimit, less
from hypha.net.peers.table import is_relayed
from hypha.telemetry.instruments import CIRCUITS_OPENED, RELAY_BYTES
from hypha.tracing import failed, start_span, trace_context
from hypha.tracing.operations import RELAY_CIRCUIT

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
SPLICE_BYTES = 256 * 1024
#: After one direction of a circuit ended, how long the other may go on.
LINGER_S = 2.0


class RelayRefused(NetworkError):
    """The relay said no, with the code ``status``."""

    def __init__(self, relay: str, status: int) -> None:
        try:
            name = StatusCode(status).name.lower().replace("_", " ")
        except ValueError:
            name = str(status)
        super().__init__(f"relay {relay} refused: {name}")


class _Circuit(RawConnection):  # type: ignore[misc]
    """One end of a circuit. Closing it ends its stream: a reset would overtake the last bytes."""

    def __init__(self, stream: Any, initiator: bool, relay: str, remote: str) -> None:
        address = Multiaddr(f"/p2p/{relay}/p2p-circuit/p2p/{remote}")
        super().__init__(stream, initiator, ConnectionType.RELAYED, [address])

    def get_remote_address(self) -> None:
        """None: what the library would say is the relay's address, not the peer's."""
        return

    async def close(self) -> None:
        with trio.move_on_after(2.0, shield=True):
            try:
                await self.stream.close()
            except STREAM_ERRORS as exc:
                logger.debug("A circuit could not be closed: %r", exc)


class RelayClient:
    """Reservations at relays, circuits through them, and circuits that arrive here."""

    def __init__(self, host: Any, streams: Streams) -> None:
        self._host = host
        self._streams = streams
        streams.handle(STOP, self._on_stop)

    async def reserve(self, relay: str) -> float:
        """Reserve (or refresh) a slot at a connected relay; returns for how many seconds.

        Raises RelayRefused, or PeerUnreachable when it does not answer.
        """
        stream = await self._streams.open(relay, HOP)
        try:
            request = HopMessage(type=HopMessage.RESERVE, peer=CircuitPeer(id=self._host.get_id().to_bytes()))
            answer = await self._ask(stream, request, relay)
        finally:
            await discard(stream)
        # the expiry is wall-clock on the wire, set by the relay; a skewed clock must not end us early
        return max(30.0, answer.reservation.expire - time.time())

    async def dial(self, relay: str, peer: str, parent: str | None = None) -> None:
        """Connect to ``peer`` through a relay, on behalf of the span ``parent``. RelayRefused,
        PeerUnreachable.
        """
        with trace_context(parent):
            stream = await self._streams.open(relay, HOP)
        async with reset_on_error(stream):
            try:
                request = HopMessage(type=HopMessage.CONNECT, peer=_circuit_peer(peer))
                with trace_context(parent):
                    add_traceparent(request)
                    await self._ask(stream, request, relay)
                circuit = _Circuit(stream, True, relay, peer)
                await self._host.upgrade_outbound_connection(circuit, ID.from_string(peer))
            except NetworkError:
                raise
            except Exception as exc:  # who is at the other end has proven nothing yet
                raise PeerUnreachable(peer, f"no TLS through relay {relay}: {exc}") from exc

    async def _ask(self, stream: Any, request: HopMessage, relay: str) -> HopMessage:
        answer: HopMessage
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await write_delimited_msg(stream, request)
                answer = await read_message(stream, HopMessage, MAX_RELAY_BYTES)
        except trio.TooSlowError as exc:
            raise PeerUnreachable(relay, f"the relay did not answer within {ANSWER_TIMEOUT_S:g} s") from exc
        except (*STREAM_ERRORS, Undecodable) as exc:
            raise PeerUnreachable(relay, f"the relay broke off: {exc!r}") from exc
        if answer.status != StatusCode.OK:
            raise RelayRefused(relay, int(answer.status))
        return answer

    async def _on_stop(self, stream: Any, relay: str) -> None:
        """A circuit arrives: accept it and let it become a connection like any other."""
        handed_over = False
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                message = await read_message(stream, StopMessage, MAX_RELAY_BYTES)
                remote = peer_id_in(message.peer.id)
                good = message.type == StopMessage.CONNECT
                status = StatusCode.OK if good else StatusCode.MALFORMED_MESSAGE
                await write_delimited_msg(
                    stream, StopMessage(type=StopMessage.STATUS, status=to_proto_status(status))
                )
            if good:
                raw: IRawConnection = _Circuit(stream, False, relay, remote)
                await self._host.upgrade_inbound_connection(raw, raw.get_transport_addresses()[0])
                handed_over = True
        except Exception as exc:  # noqa: BLE001 - the edge of a peer's stream, and nobody is at its other end yet
            logger.info("A relayed connection did not come about: %s.", exc, extra={"peer_id": relay})
        finally:
            if not handed_over:
                await discard(stream)


@dataclass
class _Reservation:
    expires_at: float
    circuits: int = 0


class RelayHop:
    """The gateway's side. Streams carry no byte or time limit: leases end jobs, not relays."""

    def __init__(self, host: Any, streams: Streams, limits: RelayLimits, caps: Caps) -> None:
        self._host = host
        self._streams = streams
        self._limits = limits
        self._caps = caps
        self._reservations: dict[str, _Reservation] = {}
        self._callers: Counter[str] = Counter()
        self._over_limit = OverLimit()
        streams.handle(HOP, self._on_hop)

    @property
    def circuits(self) -> int:
        """How many there are, those that are being made included."""
        return self._callers.total()

    @property
    def reservations(self) -> int:
        """How many are in force."""
        now = trio.current_time()
        return sum(one.expires_at > now for one in self._reservations.values())

    def forget(self, peer: str) -> None:
        """``peer`` is gone, and its reservation with it."""
        self._reservations.pop(peer, None)

    async def _on_hop(self, stream: Any, caller: str) -> None:
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                message = await read_message(stream, HopMessage, MAX_RELAY_BYTES)
            if is_relayed(stream.swarm_conn):  # a relay behind a relay would loop
                await self._answer(stream, StatusCode.PERMISSION_DENIED)
            elif message.type == HopMessage.RESERVE:
                await self._reserve(stream, caller)
            elif message.type == HopMessage.CONNECT:
                await self._connect(stream, caller, peer_id_in(message.peer.id), traceparent_of(message))
            else:
                await self._answer(stream, StatusCode.UNEXPECTED_MESSAGE)
        except (*STREAM_ERRORS, trio.TooSlowError, Undecodable) as exc:
            logger.debug("A relay request broke off: %r", exc, extra={"peer_id": caller})
        finally:
            await discard(stream)

    async def _reserve(self, stream: Any, caller: str) -> None:
        now = trio.current_time()
        for peer in [peer for peer, one in self._reservations.items() if one.expires_at <= now]:
            if not self._reservations[peer].circuits:
                del self._reservations[peer]
        mine = self._reservations.get(caller)
        if mine is None:
            if len(self._reservations) >= self._limits.reservations:
                await self._answer(stream, StatusCode.RESERVATION_REFUSED)
                return
            mine = self._reservations[caller] = _Reservation(now)
            logger.debug("Reserved a place for circuits.", extra={"peer_id": caller})
        mine.expires_at = now + self._limits.reservation_s
        reservation = Reservation(expire=int(time.time() + self._limits.reservation_s))
        await self._answer(stream, StatusCode.OK, reservation)
        await self._until_read(stream)

    async def _connect(self, stream: Any, caller: str, target: str, asked_in: str | None) -> None:
        """Relay between ``caller`` and ``target`` until either ends it. The circuit outlives the operation
        that asked for it, and serves others: so it is linked with that, and no part of it.
        """
        began, status = trio.current_time(), "broken off"
        fields = {"hypha.peer": caller, "hypha.relay.target": target}
        relaying = start_span(RELAY_CIRCUIT, fields, links=(asked_in,) if asked_in else ())
        try:
            status = await self._relay(stream, caller, target)
        finally:
            if status in ("refused", "unreachable"):
                failed(relaying, status)
            relaying.end()
            logger.debug(
                "The circuit to %s is over after %.2f s: %s.",
                target,
                trio.current_time() - began,
                status,
                extra={"peer_id": caller},
            )

    async def _relay(self, stream: Any, caller: str, target: str) -> str:
        """``accepted`` after the end of the circuit, else why there was none."""
        reservation = self._reservations.get(target)
        if reservation is None or reservation.expires_at <= trio.current_time():
            return await self._refuse(stream, StatusCode.NO_RESERVATION, "unreachable")
        limit = self._limit_of(caller, reservation)
        if limit is not None:
            self._over_limit.note(caller, "relay", limit)
            return await self._refuse(stream, StatusCode.RESOURCE_LIMIT_EXCEEDED, "refused")
        self._callers[caller] += 1
        reservation.circuits += 1
        onward = None
        try:
            onward = await self._reach(target, caller)
            if onward is None:
                return await self._refuse(stream, StatusCode.CONNECTION_FAILED, "unreachable")
            await self._answer(stream, StatusCode.OK)
            CIRCUITS_OPENED.add(status="accepted")
            logger.debug("Relaying to %s.", target, extra={"peer_id": caller})
            if (window_bytes := self._caps.window_bytes) is not None:
                for one in (stream, onward):
                    one.muxed_stream.narrow(window_bytes)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pump, stream, onward, self._caps, nursery.cancel_scope)
                nursery.start_soon(_pump, onward, stream, self._caps, nursery.cancel_scope)
            return "accepted"
        finally:
            less(self._callers, caller)
            reservation.circuits -= 1
            if onward is not None:
                await discard(onward)

    def _limit_of(self, caller: str, reservation: _Reservation) -> str | None:
        """Which limit one more circuit of ``caller`` would break."""
        if self.circuits >= self._limits.circuits:
            return f"all {self._limits.circuits} circuits are in use (max_circuits)"
        if self._callers[caller] >= self._limits.per_caller:
            return f"it has {self._limits.per_caller} circuits, half of all (max_circuits)"
        if reservation.circuits >= self._limits.per_peer:
            return f"{self._limits.per_peer} circuits lead to the peer that it wants to reach"
        return None

    async def _refuse(self, stream: Any, code: StatusCode, status: str) -> str:
        CIRCUITS_OPENED.add(status=status)
        await self._answer(stream, code)
        await self._until_read(stream)
        return status

    async def _reach(self, target: str, caller: str) -> Any | None:
        stream = None
        try:
            stream = await self._streams.open(target, STOP)
            with trio.fail_after(ANSWER_TIMEOUT_S):
                request = StopMessage(type=StopMessage.CONNECT, peer=_circuit_peer(caller))
                await write_delimited_msg(stream, request)
                answer = await read_message(stream, StopMessage, MAX_RELAY_BYTES)
            if answer.status == StatusCode.OK:
                return stream
        except (*STREAM_ERRORS, PeerUnreachable, trio.TooSlowError, Undecodable) as exc:
            logger.info("Could not reach %s for a circuit: %s.", target, exc, extra={"peer_id": target})
        if stream is not None:
            await discard(stream)
        return None

    @staticmethod
    async def _answer(stream: Any, status: StatusCode, reservation: Reservation | None = None) -> None:
        message = HopMessage(type=HopMessage.STATUS, status=to_proto_status(status), reservation=reservation)
        await write_delimited_msg(stream, message)

    @staticmethod
    async def _until_read(stream: Any) -> None:
        """A reset would overtake the answer: let the caller read it and close."""
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            with suppress(*STREAM_ERRORS):  # what we wait for
                await stream.read(1)


def _circuit_peer(peer: str) -> CircuitPeer:
    return CircuitPeer(id=ID.from_string(peer).to_bytes())


async def _pump(source: Any, sink: Any, caps: Caps, scope: trio.CancelScope) -> None:
    """Copy until ``source`` ends; then pass the end on, and give the other direction a moment."""
    try:
        while data := await source.read(caps.splice_bytes or SPLICE_BYTES):
            await sink.write(data)
            RELAY_BYTES.add(len(data))
            logger.log(TRACE, "Relayed %d bytes.", len(data))
            await caps.relayed(len(data))
        await sink.close_write()
    except StreamEOF:
        await sink.close_write()
    except STREAM_ERRORS:
        scope.cancel()
    scope.deadline = min(scope.deadline, trio.current_time() + LINGER_S)

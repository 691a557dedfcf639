"""The wires of a simulated world: machines with lines of a certain speed, latency, loss, cuts in one
direction or both, connections that break when somebody has been silent for too long, files that share
bandwidth.

Nothing here belongs to a process: what is under way is carried on while its sender is frozen or dead. A
message whose way is cut waits, as TCP's repetitions do, until the way is whole again or its connection is
given up. Whoever reads from a connection notices its end by a reset from a living machine, at once, or by
silence, after :data:`LIVENESS_S`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import trio

from hypha.errors import PeerUnreachable
from hypha.node import Changes
from hypha.simulation.net.lines import SimulatedFlow, SimulatedMachine, share_lines

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

#: as in hypha.net.options.Timings
LIVENESS_S = 10.0
DIAL_S = 5.0
#: a file of which nothing came for so long is given up
STALL_S = 10.0
_LOOK_S = 0.5
#: first pause before a lost packet is sent again; doubled each time, as TCP does
_REPEAT_S, _LONGEST_REPEAT_S = 0.2, 2.0
#: beside its payload
_OVERHEAD_BYTES = 100


class SimulatedLinkBroken(Exception):
    """A file's way ended before the file did."""


@dataclass(eq=False)
class SimulatedConnection:
    """Between two nodes, perhaps through a gateway; each end knows by itself whether it is open."""

    ends: dict[str, SimulatedNode]
    relay: str | None = None
    open_at: dict[str, bool] = field(default_factory=dict)
    silent_s: dict[str, float] = field(default_factory=dict)
    #: calls that rest on it, by the end that made them
    calls: dict[str, dict[object, Callable[[PeerUnreachable], None]]] = field(default_factory=dict)

    @property
    def dialled_by(self) -> str:
        return next(iter(self.ends))

    def other(self, peer: str) -> str:
        return next(one for one in self.ends if one != peer)


class SimulatedNetwork:
    """All machines, and what lies between them. ``nursery`` is the world's; :meth:`run` lets time pass."""

    def __init__(self, nursery: trio.Nursery, random: Random) -> None:
        self.machines: dict[str, SimulatedMachine] = {}
        #: those that are running now
        self.nodes: dict[str, SimulatedNode] = {}
        self._nursery = nursery
        self._random = random
        self._cuts: dict[tuple[str, str], int] = {}
        self._connections: dict[tuple[str, str], SimulatedConnection] = {}
        self._dialing: dict[tuple[str, str], trio.Event] = {}
        self._flows: list[SimulatedFlow] = []
        self._changed = Changes()
        #: bytes of files that arrived
        self.carried = 0

    def start(self, call: Callable[[], object]) -> None:
        """Have something happen outside of all processes."""
        self._nursery.start_soon(call)  # type: ignore[arg-type]

    # --- faults -------------------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Nothing from ``source`` reaches ``target`` any more. Cuts are counted: each is mended apart."""
        self._cuts[source, target] = self._cuts.get((source, target), 0) + 1
        self.touch()

    def mend(self, source: str, target: str) -> None:
        left = self._cuts.get((source, target), 0) - 1
        if left > 0:
            self._cuts[source, target] = left
        else:
            self._cuts.pop((source, target), None)
        self.touch()

    def touch(self) -> None:
        """A line's speed, or somebody's state, has changed."""
        self._changed.note()

    def is_open(self, source: str, target: str) -> bool:
        """Do packets get through from ``source`` to ``target``?"""
        return (source, target) not in self._cuts

    # --- messages -----------------------------------------------------------------------------------

    async def carry(self, hops: tuple[tuple[str, str], ...], size: int = 0) -> None:
        """One message along ``hops``; as long as its way is cut, this waits."""
        for source, target in hops:
            await self._hop(source, target, size + _OVERHEAD_BYTES)

    async def _hop(self, source: str, target: str, size: int) -> None:
        start, end = self.machines[source], self.machines[target]
        repeat_s = _REPEAT_S
        while True:
            wire_s = size / (start.up_bytes_s * start.slowed) + size / (end.down_bytes_s * end.slowed)
            latency_s = (start.latency_s + end.latency_s) * self._random.uniform(1.0, 1.3)
            await trio.sleep(wire_s + latency_s)
            lost = self._random.random() < start.loss
            if self.is_open(source, target) and not lost:
                return
            with trio.move_on_after(repeat_s):
                while not self.is_open(source, target):
                    await self._changed.wait()
                await trio.sleep_forever()
            repeat_s = min(_LONGEST_REPEAT_S, repeat_s * 2.0)

    # --- connections --------------------------------------------------------------------------------

    def connection(self, peer: str, other: str) -> SimulatedConnection | None:
        """The one that ``peer`` believes in."""
        found = self._connections.get(_pair(peer, other))
        return found if found is not None and found.open_at.get(peer) else None

    def connections_of(self, peer: str) -> list[SimulatedConnection]:
        """All that ``peer`` believes in."""
        return [one for one in self._connections.values() if one.open_at.get(peer)]

    async def connect(self, node: SimulatedNode, other: str, relays: tuple[str, ...]) -> SimulatedConnection:
        """A connection from ``node`` to ``other``, directly or through one of the gateways ``relays``.
        Raises PeerUnreachable.
        """
        pair = _pair(node.peer_id, other)
        while True:
            found = self.connection(node.peer_id, other)
            if found is not None:
                return found
            dialing = self._dialing.get(pair)
            if dialing is None:
                break
            await dialing.wait()
        self._dialing[pair] = trio.Event()
        try:
            return await self._dial(node, other, relays)
        finally:
            self._dialing.pop(pair).set()

    async def _dial(self, node: SimulatedNode, other: str, relays: tuple[str, ...]) -> SimulatedConnection:
        me = node.peer_id
        direct = not self.machines[other].behind_nat if other in self.machines else False
        ways: list[str | None] = [None] if direct else []
        # without an address of its own it is reached through a gateway that holds its reservation
        ways += [relay for relay in relays if self._reserved(relay, other) and self.connection(me, relay)]
        failure = PeerUnreachable(other, "no address of it is known that could be dialled")
        for way in ways:
            try:
                with trio.fail_after(DIAL_S):
                    return await self._dial_by(node, other, way)
            except trio.TooSlowError:
                failure = PeerUnreachable(other, f"no answer within {DIAL_S:g} s")
            except PeerUnreachable as exc:
                failure = exc
        raise failure

    def _reserved(self, relay: str, other: str) -> bool:
        return relay in self.nodes and self.connection(other, relay) is not None

    async def _dial_by(self, node: SimulatedNode, other: str, relay: str | None) -> SimulatedConnection:
        me = node.peer_id
        there = _hops(me, other, relay)
        back = _hops(other, me, relay)
        await self.carry(there)
        target = self.nodes.get(other)
        if target is None:
            # the machine is up, and nobody listens there
            await self.carry(back)
            raise PeerUnreachable(other, "connection refused", gone=relay is None)
        await self.carry(back)
        await self.carry(there)
        while target.process.frozen:
            # its kernel takes the connection, but nobody shakes hands
            await self._changed.wait()
        await self.carry(back)
        if self.nodes.get(other) is not target or self.nodes.get(me) is not node:
            raise PeerUnreachable(other, "the connection was reset", gone=False)
        found = self._connections.get(_pair(me, other))
        if found is not None:
            # what one end has not noticed yet is over now
            self.drop(found, other)
            self.drop(found, me)
        connection = SimulatedConnection(ends={me: node, other: target}, relay=relay)
        for peer in (me, other):
            connection.open_at[peer] = True
            connection.silent_s[peer] = 0.0
            connection.calls[peer] = {}
        self._connections[_pair(me, other)] = connection
        node.connected(other)
        target.connected(me)
        return connection

    def hops(self, connection: SimulatedConnection, source: str) -> tuple[tuple[str, str], ...]:
        return _hops(source, connection.other(source), connection.relay)

    def drop(self, connection: SimulatedConnection, peer: str, reason: str = "the connection broke") -> None:
        """The end of ``peer`` notices that it is over."""
        if not connection.open_at.get(peer):
            return
        connection.open_at[peer] = False
        calls, connection.calls[peer] = connection.calls[peer], {}
        other = connection.other(peer)
        for fail in calls.values():
            fail(PeerUnreachable(other, f"{reason} before the answer"))
        node = connection.ends[peer]
        if not any(connection.open_at.values()):
            pair = _pair(peer, other)
            if self._connections.get(pair) is connection:
                del self._connections[pair]
        if self.nodes.get(peer) is node:
            node.lost(other)
        if connection.open_at.get(other):
            self._nursery.start_soon(self._reset, connection, other)

    async def _reset(self, connection: SimulatedConnection, peer: str) -> None:
        """Tell the end of ``peer`` that there is no connection any more."""
        with trio.move_on_after(LIVENESS_S):
            await self.carry(self.hops(connection, connection.other(peer)))
            self.drop(connection, peer, "the connection was reset")

    def gone(self, node: SimulatedNode) -> None:
        """A node's process has ended: its machine resets what it had."""
        if self.nodes.get(node.peer_id) is node:
            del self.nodes[node.peer_id]
        for connection in list(self._connections.values()):
            if connection.ends.get(node.peer_id) is node:
                self.drop(connection, node.peer_id)
            elif connection.relay == node.peer_id:
                for peer in connection.ends:
                    self.drop(connection, peer, "its relay is gone")
        for flow in self._flows:
            if any(machine.peer == node.peer_id for machine, _ in flow.stages):
                flow.broken = True
                flow.done.set()
        self.touch()

    def _silent(self, connection: SimulatedConnection, peer: str) -> bool:
        """Does nothing come to ``peer`` from the other end?"""
        other = connection.other(peer)
        node = connection.ends[other]
        if self.nodes.get(other) is not node or node.process.frozen:
            return True
        return not all(self.is_open(*hop) for hop in self.hops(connection, other))

    async def run(self) -> None:
        """Cut connections that fell silent, and move files, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(self._move)

    async def _watch(self) -> None:
        while True:
            disturbed = False
            for connection in list(self._connections.values()):
                for peer in list(connection.ends):
                    if not connection.open_at.get(peer) or connection.ends[peer].process.frozen:
                        continue
                    if not self._silent(connection, peer):
                        connection.silent_s[peer] = 0.0
                        continue
                    disturbed = True
                    connection.silent_s[peer] += _LOOK_S
                    if connection.silent_s[peer] >= LIVENESS_S:
                        self.drop(connection, peer, f"nothing came for {LIVENESS_S:g} s")
            if disturbed:
                await trio.sleep(_LOOK_S)
            else:
                await self._changed.wait()

    # --- files --------------------------------------------------------------------------------------

    async def flow(
        self,
        source: str,
        target: str,
        size: int,
        stall_s: float,
        moved: Callable[[float], None],
        kept: bool = False,
    ) -> None:
        """Move ``size`` bytes, without a handshake over a connection that was ``kept``; ``moved`` is called
        with how many have arrived. Raises SimulatedLinkBroken when nothing does for ``stall_s``, or when one
        of the two ends is gone.
        """
        connection = self.connection(source, target) or self.connection(target, source)
        relay = connection.relay if connection is not None else None
        hops = _hops(source, target, relay)
        stages: list[tuple[SimulatedMachine, str]] = []
        for start, end in hops:
            stages += [(self.machines[start], "up"), (self.machines[end], "down")]
        flow = SimulatedFlow(tuple(stages), hops, float(size + _OVERHEAD_BYTES), moved_at=trio.current_time())
        # the handshake
        with trio.move_on_after(stall_s) as shaking:
            if not kept:
                await self.carry(hops)
                await self.carry(tuple((end, start) for start, end in reversed(hops)))
        if shaking.cancelled_caught or source not in self.nodes or target not in self.nodes:
            raise SimulatedLinkBroken("it could not be begun")
        flow.moved_at = trio.current_time()
        self._flows.append(flow)
        self.touch()
        try:
            while not flow.done.is_set():
                with trio.move_on_after(max(_LOOK_S, stall_s / 4)):
                    await flow.done.wait()
                moved(flow.moved)
                if not flow.done.is_set() and trio.current_time() - flow.moved_at >= stall_s:
                    raise SimulatedLinkBroken(f"nothing moved for {stall_s:g} s")
        finally:
            if flow in self._flows:
                self._flows.remove(flow)
                self.touch()
        if flow.broken:
            raise SimulatedLinkBroken("the other end is gone")
        self.carried += size

    def _moves(self, flow: SimulatedFlow) -> bool:
        ends = (peer for hop in flow.hops for peer in hop if peer in self.nodes)
        return all(self.is_open(*hop) for hop in flow.hops) and not any(
            self.nodes[peer].process.frozen for peer in ends
        )

    async def _move(self) -> None:
        then = trio.current_time()
        while True:
            share_lines(self._flows, self._moves)
            ends = [flow.left / flow.rate for flow in self._flows if flow.rate > 0]
            with trio.move_on_after(min(ends, default=math.inf)):
                await self._changed.wait()
            now = trio.current_time()
            for flow in self._flows:
                if flow.rate > 0 and now > then:
                    step = min(flow.left, flow.rate * (now - then))
                    flow.left -= step
                    flow.moved += step
                    flow.moved_at = now
                    if flow.left <= 1e-6:
                        flow.done.set()
            then = now


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def _hops(source: str, target: str, relay: str | None) -> tuple[tuple[str, str], ...]:
    return ((source, target),) if relay is None else ((source, relay), (relay, target))

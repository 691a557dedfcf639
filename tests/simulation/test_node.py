"""A node of a simulated world has the shape of a real one."""

from __future__ import annotations

from contextlib import AsyncExitStack
from random import Random

import pytest
import trio
import trio.testing

from hypha.simulation.net.lines import SimulatedMachine
from hypha.simulation.net.network import SimulatedNetwork
from hypha.simulation.net.node import SimulatedOptions, open_simulated_node
from hypha.simulation.process import SimulatedProcess, SimulatedRuntime, Stepping, forget_generators


def test_connections_tell_their_way_and_the_latency_of_their_line() -> None:
    found = []

    async def main() -> None:
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            network = SimulatedNetwork(nursery, Random(1))
            machines = [
                SimulatedMachine("gateway", frozenset(), latency_s=0.01),
                SimulatedMachine("near", frozenset({"worker"}), latency_s=0.02),
                SimulatedMachine("far", frozenset({"scheduler"}), latency_s=0.03, behind_nat=True),
            ]
            nodes = []
            for machine in machines:
                network.machines[machine.peer] = machine
                process = SimulatedProcess(
                    machine.peer, SimulatedRuntime(1, lambda: 0.0, lambda _: 0), nursery, lambda _, exc: None
                )
                hop = machine.peer == "gateway"
                options = SimulatedOptions(machine.peer, () if hop else ("gateway",), hop)
                opening = open_simulated_node(network, machine, process, options)
                nodes.append(await stack.enter_async_context(opening))
            _, near, far = nodes
            await near.wait_connected()
            await far.wait_connected()
            near.learn(far.ref())
            await near.connect("far")
            found.extend((near.connections(), far.connections()))
            nursery.cancel_scope.cancel()
        forget_generators()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[Stepping()])
    ours, theirs = ({one.peer: one for one in connections} for connections in found)
    assert (ours["gateway"].kind, ours["gateway"].direction) == ("direct", "outbound")
    assert ours["gateway"].round_trip_s == pytest.approx(2 * (0.02 + 0.01))
    assert (ours["far"].kind, ours["far"].direction) == ("relayed", "outbound")
    assert ours["far"].roles == {"scheduler"}
    assert ours["far"].address == "/sim/gateway"
    # each line is passed twice on the way to the gateway and on from there
    assert ours["far"].round_trip_s == pytest.approx(2 * (0.02 + 0.01 + 0.01 + 0.03))
    assert theirs["near"].direction == "inbound"
    assert theirs["near"].round_trip_s == ours["far"].round_trip_s

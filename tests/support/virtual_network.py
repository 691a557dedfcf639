"""A Hypha network in memory, under a virtual clock: of the shape of :mod:`tests.support.network`, for tests
whose nodes only have to carry messages and files.

A minute of leases and deadlines passes in the time that the test computes, and on a busy machine no lease is
lost for want of processor time. What is real about a node (libp2p, TLS, sockets, metrics) is not here;
blocking calls run in the loop, as the clock would jump while a thread computes::

    @virtual_time
    async def test_something(network):
        async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:
            ...
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest
import trio
import trio.testing

from hypha.config.models import SchedulerConfig
from hypha.runtime import use_runtime
from hypha.scheduler.job.run import run_job
from hypha.scheduler.job.states import JobResult, Observation
from hypha.simulation.net.lines import SimulatedMachine
from hypha.simulation.net.network import SimulatedNetwork
from hypha.simulation.net.node import SimulatedNode, SimulatedOptions, open_simulated_node
from hypha.simulation.process import SimulatedProcess, SimulatedRuntime

T = TypeVar("T")

#: a day at which every test begins, and what is free on its disk
BEGINS = 1_790_000_000.0
FREE_BYTES = 1 << 40


def _run(test: Callable[[], Awaitable[T]], clock: None, instruments: Sequence[trio.abc.Instrument]) -> T:
    jumps = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(test, clock=jumps, instruments=instruments)


#: For tests, one by one (pytest-trio's own mark is nearer than a module's): time jumps when all wait.
virtual_time = pytest.mark.trio(run=_run)


class VirtualNetwork:
    """Opens gateways and leaves that trust each other; ``runtime`` is in force for all, and for the test."""

    def __init__(self, carrier: SimulatedNetwork, runtime: SimulatedRuntime) -> None:
        self.carrier = carrier
        self.runtime = runtime
        #: what came out of tasks and handlers of nodes, which nothing may
        self.crashes: list[BaseException] = []
        self._numbers = itertools.count()

    def settings(self, component: str, gateways: Sequence[SimulatedNode]) -> dict[str, Any]:
        """What a configuration says of a new node of ``component`` and its way into the network."""
        name = f"{component}-{next(self._numbers)}"
        files = {f"{kind}_pem": Path(f"{name}.{kind}") for kind in ("cert", "key", "trust")}
        return {**files, "gateway_addresses": [one.peer_id for one in gateways]}

    async def run_job(
        self, config: SchedulerConfig, observation: Observation | None = None, *, fresh: bool = False
    ) -> JobResult:
        """``run_job`` of a scheduler here, whose peer follows from its configuration."""

        def opened() -> Any:
            name = config.cert_pem.stem
            return self._open(name, "scheduler", config.gateway_addresses, ("scheduler",))

        return await run_job(config, observation, open_=opened, fresh=fresh)

    @asynccontextmanager
    async def gateway(self, others: Sequence[SimulatedNode] = ()) -> AsyncIterator[SimulatedNode]:
        """A gateway, linked with ``others``."""
        peers = [one.peer_id for one in others]
        name = f"gateway-{next(self._numbers)}"
        async with self._open(name, "gateway", peers, ("gateway",), hop=True) as node:
            yield node

    @asynccontextmanager
    async def leaf(
        self,
        component: str,
        gateways: Sequence[SimulatedNode | str] = (),
        connected: bool = True,
        roles: Sequence[str] = (),
        organization: str = "",
    ) -> AsyncIterator[SimulatedNode]:
        """A worker, scheduler or data node; waits until it is connected unless ``connected=False``. A gateway
        that is not there yet is given by its peer. ``organization`` is the one that vouches for it.
        """
        peers = [one if isinstance(one, str) else one.peer_id for one in gateways]
        name = f"{component}-{next(self._numbers)}"
        async with self._open(name, component, peers, roles, organization=organization) as node:
            if connected:
                with trio.fail_after(10):
                    await node.wait_connected()
            yield node

    @asynccontextmanager
    async def _open(
        self,
        name: str,
        component: str,
        gateways: Sequence[str],
        roles: Sequence[str],
        hop: bool = False,
        organization: str = "",
    ) -> AsyncIterator[SimulatedNode]:
        machine = SimulatedMachine(name, frozenset(roles), organization=organization)
        self.carrier.machines[machine.peer] = machine
        async with trio.open_nursery() as nursery:
            process = SimulatedProcess(name, self.runtime, nursery, self._crashed)
            options = SimulatedOptions(f"hypha-{component}", tuple(gateways), hop)
            async with open_simulated_node(self.carrier, machine, process, options) as node:
                yield node
            # its tasks end with it
            nursery.cancel_scope.cancel()

    def _crashed(self, process: SimulatedProcess, exc: BaseException) -> None:
        exc.add_note(f"in {process.name}")
        self.crashes.append(exc)


@pytest.fixture
async def network() -> AsyncIterator[VirtualNetwork]:
    """A network of this test alone, the same each time."""
    if not isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock):
        raise TypeError("a test with this network needs the mark virtual_time")
    runtime = SimulatedRuntime(0, lambda: BEGINS + trio.current_time(), lambda _: FREE_BYTES)
    # fixtures and their test share one context
    with use_runtime(runtime):
        async with trio.open_nursery() as nursery:
            carrier = SimulatedNetwork(nursery, Random(0))
            nursery.start_soon(carrier.run)
            made = VirtualNetwork(carrier, runtime)
            yield made
            nursery.cancel_scope.cancel()
    if made.crashes:
        raise made.crashes[0]

"""The lines of simulated machines, and how files on their way share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio


@dataclass(eq=False)
class SimulatedMachine:
    """A computer and its line: ``latency_s`` one way to the middle of the network, bytes a second."""

    peer: str
    roles: frozenset[str]
    latency_s: float = 0.005
    up_bytes_s: float = 1e6
    down_bytes_s: float = 1e6
    behind_nat: bool = False
    #: that vouches for its certificate
    organization: str = ""
    #: what is left of the line's speed
    slowed: float = 1.0
    #: chance that a packet on its way from here is lost
    loss: float = 0.0


@dataclass(eq=False)
class SimulatedFlow:
    stages: tuple[tuple[SimulatedMachine, str], ...]
    hops: tuple[tuple[str, str], ...]
    left: float
    rate: float = 0.0
    moved_at: float = 0.0
    moved: float = 0.0
    done: trio.Event = field(default_factory=trio.Event)
    broken: bool = False


def share_lines(flows: Sequence[SimulatedFlow], moves: Callable[[SimulatedFlow], bool]) -> None:
    """Give each flow that ``moves`` its max-min fair rate: the fullest line is shared out first."""
    for flow in flows:
        flow.rate = 0.0
    left = [flow for flow in flows if not flow.done.is_set() and moves(flow)]
    free = {
        (machine.peer, way): (machine.up_bytes_s if way == "up" else machine.down_bytes_s) * machine.slowed
        for flow in left
        for machine, way in flow.stages
    }
    while left:
        users: dict[tuple[str, str], int] = {}
        for flow in left:
            for machine, way in flow.stages:
                users[machine.peer, way] = users.get((machine.peer, way), 0) + 1
        line = min(users, key=lambda one: (free[one] / users[one], one))
        rate = free[line] / users[line]
        for flow in [one for one in left if any((m.peer, w) == line for m, w in one.stages)]:
            flow.rate = rate
            left.remove(flow)
            for machine, way in flow.stages:
                free[machine.peer, way] = max(0.0, free[machine.peer, way] - rate)

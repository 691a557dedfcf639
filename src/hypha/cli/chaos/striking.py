"""The two hands of ``hypha chaos``: one strikes nodes, by a schedule that a seed decides, so that a run can
be had again; the other starts again what has ended.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from hypha.cli.chaos.faults import How, Role, StruckNode, TargetJob, again, candidates, recover, strike
from hypha.cli.chaos.measuring import LedgerFollower
from hypha.cli.chaos.report import InjectedFault, UnexpectedEnd
from hypha.cli.local.children import Child, NetworkFailed
from hypha.cli.local.network import NO_ANSWER, Network, base
from hypha.scheduler.status.snapshot import JobSnapshot

_NODES: tuple[Role, ...] = ("worker", "parameter-server", "scheduler", "data", "gateway")
_PROCESSES: tuple[Role, ...] = ("training-executor", "parameter-server-executor")

#: Who can be struck how.
TARGETS: dict[How, tuple[Role, ...]] = {
    "kill": _NODES + _PROCESSES,
    "stop": _NODES + _PROCESSES,
    "cut": _NODES,
    "slow": _NODES,
    "corrupt": ("worker", "scheduler", "data"),
    "fill_disk": ("worker", "parameter-server", "scheduler"),
}
#: A supervisor starts a killed node again after so long (systemd's RestartSec).
RESTART_S = 1.0
#: Other faults are healed after some seconds, ...
HOLD_S = (2.0, 6.0)
#: ... but well before the next one strikes, a share of the interval.
_HOLD_SHARE = 0.5
#: Faults come at the interval's multiples, earlier or later by up to this share of it.
_JITTER = 0.25


@dataclass(frozen=True)
class Planned:
    """``at_s`` counts from the first moment of the disturbance; it is healed ``hold_s`` later. ``pick``, of
    [0, 1), chooses among the nodes of that role.
    """

    at_s: float
    role: Role
    how: How
    hold_s: float
    pick: float = 0.0


def plan(seed: int, seconds: float, interval_s: float, hows: Sequence[How]) -> list[Planned]:
    """Each role in each way before any comes again. The last one leaves an interval to recover in."""
    rng = random.Random(seed)
    pairs = _deck(rng, hows)
    planned = []
    for number in range(1, int(seconds // interval_s)):
        at_s = interval_s * (number + rng.uniform(-_JITTER, _JITTER))
        role, how = next(pairs)
        hold_s = min(rng.uniform(*HOLD_S), interval_s * _HOLD_SHARE)
        planned.append(Planned(at_s, role, how, RESTART_S if how == "kill" else hold_s, rng.random()))
    return planned


def _deck(rng: random.Random, hows: Sequence[How]) -> Iterator[tuple[Role, How]]:
    cards = [(role, how) for how in hows for role in TARGETS[how]]
    while True:
        rng.shuffle(cards)
        yield from cards


_LOOK_S = 0.1
#: How long somebody is looked for who has the role; the parameter server's may be vacant for a while.
_PATIENCE_S = 10.0


class Supervisor:
    """Starts what has ended again after a second, as systemd would with ``Restart=always``."""

    def __init__(self, network: Network) -> None:
        self._network = network
        #: processes that we have killed
        self.killed: set[int] = set()
        #: what ended without having been killed
        self.ended: list[UnexpectedEnd] = []

    async def run(self) -> None:
        known: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for child in self._network.group.running:
                    if child.process.poll() is not None and child.name not in known:
                        known.add(child.name)
                        nursery.start_soon(self._restart, child)
                await trio.sleep(_LOOK_S)

    async def _restart(self, child: Child) -> None:
        if child.process.pid not in self.killed:
            code = child.process.poll()
            self.ended.append(UnexpectedEnd(child.name, -1 if code is None else code, child.tail()))
        # what is left of its process group goes first
        await self._network.group.stop([child])
        await trio.sleep(RESTART_S)
        await again(self._network, child, self._network.roles[base(child.name)])


@dataclass
class Striker:
    """Carries out a plan on a running job."""

    network: Network
    ledger: LedgerFollower
    supervisor: Supervisor
    tell: Callable[[str], None]
    struck: list[InjectedFault] = field(default_factory=list)
    _seen: JobSnapshot = field(default_factory=lambda: JobSnapshot(name=""))

    async def run(self, planned: Sequence[Planned]) -> None:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for one in planned:
                await trio.sleep_until(began + one.at_s)
                await self._strike(nursery, one, began)

    async def _strike(self, nursery: trio.Nursery, one: Planned, began: float) -> None:
        why = ""
        with trio.move_on_after(_PATIENCE_S):
            while True:
                try:
                    fault = await self._try(one)
                except NetworkFailed as exc:
                    why = str(exc).partition(" in JobSnapshot")[0]
                    await trio.sleep(_LOOK_S)
                    continue
                at = trio.current_time()
                row = InjectedFault(
                    at, at - began, one.role, one.how, base(fault.node.name), self.ledger.round
                )
                self.struck.append(row)
                self.tell(f"{row.at_s:6.1f} s  round {row.round}: {one.how} {one.role} {row.node}")
                nursery.start_soon(self._heal, fault, one.hold_s)
                nursery.start_soon(self._tell, row)
                return
        self.tell(f"{trio.current_time() - began:6.1f} s  {one.how} {one.role} is skipped: {why}")

    async def _try(self, one: Planned) -> StruckNode:
        scheduler = next(iter(self.network.running("scheduler")), None)
        if scheduler is None:
            raise NetworkFailed("the scheduler is down")
        if one.role not in ("scheduler", "data", "gateway"):
            try:
                self._seen = await self.network.status(scheduler)
            except NO_ANSWER as exc:
                raise NetworkFailed(f"the scheduler does not answer: {exc}") from exc
        job = TargetJob(self.network, scheduler)
        found = candidates(job, one.role, self._seen)
        name = base(found[int(one.pick * len(found))].name)
        fault = strike(job, one.role, one.how, self._seen, name)
        if one.how == "kill":
            self.supervisor.killed.update(fault.pids)
        return fault

    async def _heal(self, fault: StruckNode, hold_s: float) -> None:
        if fault.how == "kill":
            return  # the supervisor's, or its worker's
        try:
            await trio.sleep(hold_s)
        finally:
            with trio.CancelScope(shield=True):
                await recover(self.network, fault)

    async def _tell(self, row: InjectedFault) -> None:
        applied = await self.ledger.next_round(float("inf"))
        if applied is not None:
            after_s = applied.at - row.struck
            self.tell(f"{row.at_s:6.1f} s    round {applied.round} was applied {after_s:.1f} s later")

"""What happens in a simulated world, as plain values: a network, a job, and faults, each at its moment.

A :class:`Scenario` holds everything: with its seed it is the same run every time. It is written and read as
JSON, and its ``repr`` can be pasted into a test.
"""

from __future__ import annotations

from random import Random
from typing import Literal, get_args

import msgspec
from msgspec import Struct

#: a node's part in the job, or one of the processes that a worker runs for it
Role = Literal[
    "worker",
    "parameter-server",
    "training-executor",
    "parameter-server-executor",
    "scheduler",
    "data",
    "gateway",
]
#: ``kill`` ends a process at once, and it is started again after ``for_s``; ``freeze`` stops it for
#: ``for_s``; ``restart`` ends it politely and starts it again; ``cut``: nothing passes for ``for_s``,
#: ``deaf`` nothing comes in, ``mute`` nothing goes out; ``partition``: it and the workers do not reach each
#: other, all others do; ``slow``: a hundredth of its line's speed is left; ``lossy``: every fifth packet is
#: lost; ``corrupt``: a file that it keeps has another byte; ``full-disk``: no byte is free; ``slow-disk``:
#: every blocking call takes half a second more; ``clock``: its time of day jumps
NodeWay = Literal[
    "kill",
    "freeze",
    "restart",
    "cut",
    "deaf",
    "mute",
    "partition",
    "slow",
    "lossy",
    "corrupt",
    "full-disk",
    "slow-disk",
    "clock",
]
#: what a worker does from then on: its updates stand for 10^12 samples (``claim``), or are huge
#: (``blow-up``); it reports progress and sends no update (``withhold``), never has the model
#: (``never-load``), or asks for slices without end (``hoard``); or it begins anew, offers a million cores,
#: and never loads (``boast``)
Lie = Literal["claim", "blow-up", "withhold", "never-load", "hoard", "boast"]
#: ``lose`` is a kill after which it stays away; ``notice``: a worker's machine is taken away, as spot
#: machines are, ``notice_s`` after it was told so, and another one comes in its place; ``stall``: a training
#: executor runs, and its batches take for ever
Way = Literal[NodeWay, "lose", "notice", "stall", Lie]
#: as ``offer.strategy`` of a worker
Strategy = Literal["flexible", "whole", "utilization", "affinity"]
Phase = Literal["loading", "training", "scheduled", "updating", "closing", "exporting"]

ROLES: tuple[Role, ...] = get_args(Role)
PHASES: tuple[Phase, ...] = get_args(Phase)
NODE_WAYS: tuple[Way, ...] = get_args(NodeWay)
LIES: tuple[Way, ...] = get_args(Lie)
#: an executor is a process and has neither a line nor a disk of its own
EXECUTOR_WAYS: tuple[Way, ...] = ("kill", "freeze", "stall")


class Strike(Struct, frozen=True):
    """``role`` is struck in ``phase`` of ``round`` (or as soon as the job is that far), ``after_s`` later."""

    role: Role
    way: Way
    round: int
    phase: Phase
    after_s: float = 0.0
    for_s: float = 5.0


class Scenario(Struct, frozen=True):
    """Spare workers are free when the job begins. Speeds are seconds a batch, one worker after the other."""

    seed: int = 0
    workers: int = 3
    spare_workers: int = 1
    gateways: int = 1
    data_nodes: int = 2
    rounds: int = 6
    batch_size: int = 4
    samples_a_round: int = 96
    slices: int = 8
    rows: int = 30
    batch_s: tuple[float, ...] = (0.2, 0.25, 0.3)
    load_s: float = 2.0
    latency_s: float = 0.01
    line_bytes_s: float = 100_000.0
    disk_s: float = 0.002
    #: each machine's time of day runs fast or slow by up to this share
    clock_drift: float = 0.0
    behind_nat: int = 0
    #: parameter servers run on a machine of their own, and on the spare workers
    apart: bool = False
    min_workers: int | None = None
    checkpoint_every: int = 2
    replicas: int = 0
    lease_s: float = 10.0
    hang_s: float | None = 8.0
    #: of the machines of workers, where one is taken away in the scenario
    notice_s: float = 10.0
    model_s: float = 30.0
    deadline_s: float = 15.0
    #: other schedulers with the same job, each of which wants a worker less; a worker trains for one of them
    rivals: int = 0
    #: public bid and private maximum of each scheduler, one after the other, and what workers ask
    bids: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    prices: tuple[float, ...] = (1.0,)
    strategies: tuple[Strategy, ...] = ("flexible",)
    faults: tuple[Strike, ...] = ()
    #: the job must be over so long after the last fault was mended
    patience_s: float = 600.0


def gives_notice(scenario: Scenario) -> bool:
    return any(fault.way == "notice" for fault in scenario.faults)


def random_scenario(seed: int) -> Scenario:
    """The network, the job and one to four faults that ``seed`` stands for.

    Of ten seeds the last one stands for two faults that meet: what goes wrong only then is too seldom met
    by faults that do not know of each other. The one before it has a worker that lies.
    """
    random = Random(f"scenario {seed}")
    workers = random.choice((2, 3, 3, 4))
    rounds = random.choice((4, 6, 8))
    every = random.choice((1, 2, 3))
    nat = random.choice((0, 0, 0, 1, 2))
    scenario = Scenario(
        seed=seed,
        workers=workers,
        spare_workers=random.choice((1, 1, 2)),
        gateways=random.choice((1, 2)),
        data_nodes=random.choice((1, 2, 2)),
        rounds=rounds,
        samples_a_round=random.choice((48, 96, 160)),
        slices=random.choice((5, 8, 12)),
        rows=random.choice((10, 30, 50)),
        batch_s=tuple(round(random.choice((0.05, 0.2, 0.4)) * random.uniform(0.7, 1.3), 3) for _ in range(4)),
        load_s=random.choice((0.5, 2.0, 5.0)),
        latency_s=random.choice((0.001, 0.01, 0.08)),
        line_bytes_s=random.choice((20_000.0, 100_000.0, 1_000_000.0)),
        disk_s=random.choice((0.0, 0.002, 0.02)),
        clock_drift=random.choice((0.0, 0.0, 0.1)),
        behind_nat=nat,
        apart=random.random() < 0.3,
        min_workers=random.choice((None, 1, max(1, workers - 1))),
        checkpoint_every=every,
        replicas=random.choice((0, 0, 1)),
        faults=tuple(random_fault(random, rounds) for _ in range(random.choice((1, 1, 2, 2, 3, 4)))),
    )
    if seed % 10 == 8:
        return _a_liar(scenario, random)
    if seed % 10 != 9:
        return scenario
    return random.choice((_two_deaths, _no_way_back))(scenario, random)


def _a_liar(scenario: Scenario, random: Random) -> Scenario:
    """One worker lies from some moment on, and something else goes wrong as well."""
    lie = Strike("worker", random.choice(LIES), random.randrange(scenario.rounds), random.choice(PHASES[:4]))
    return msgspec.structs.replace(scenario, spare_workers=2, faults=(lie, *scenario.faults[:1]))


def _two_deaths(scenario: Scenario, random: Random) -> Scenario:
    """A worker dies with whoever holds the state of its round, just when its update counts."""
    round_ = random.randrange(1, scenario.rounds - 1)
    phase: Phase = random.choice(("scheduled", "updating", "updating", "closing"))
    after_s = random.choice((0.0, 0.1))
    deaths = (
        Strike(random.choice(("parameter-server", "scheduler")), "kill", round_, phase, after_s, 20.0),
        Strike("worker", random.choice(("kill", "lose")), round_, phase, after_s, 1.0),
    )
    return msgspec.structs.replace(
        scenario, spare_workers=2, slices=5, rows=10, checkpoint_every=1, min_workers=None, faults=deaths
    )


def _no_way_back(scenario: Scenario, random: Random) -> Scenario:
    """The parameter server and its workers lose each other's sight while no gateway could tell the way."""
    round_ = random.randrange(1, scenario.rounds - 1)
    cut_s = random.uniform(100.0, 200.0)
    outage = (
        Strike("gateway", "kill", round_ - 1, "training", 0.0, cut_s + random.uniform(40.0, 100.0)),
        Strike("parameter-server", "partition", round_, "closing", 0.0, cut_s),
    )
    return msgspec.structs.replace(
        scenario, gateways=1, apart=True, behind_nat=0, deadline_s=200.0, faults=outage
    )


def random_fault(random: Random, rounds: int) -> Strike:
    """Of anybody, in any way, in a job of so many ``rounds``."""
    role = random.choice(ROLES)
    way: Way = random.choice(EXECUTOR_WAYS if role.endswith("executor") else NODE_WAYS)
    if way == "kill" and role == "worker" and random.random() < 0.3:
        way = "lose"
    if way == "restart" and role in ("worker", "parameter-server") and random.random() < 0.5:
        way = "notice"
    if way == "stall":
        role = "training-executor"
    for_s = round(random.choice((random.uniform(0.1, 3.0), random.uniform(3.0, 25.0))), 3)
    if way == "stall":
        for_s = random.choice((10.0, 500.0))
    if way == "partition":
        for_s *= 4.0
    return Strike(
        role=role,
        way=way,
        round=random.randrange(rounds),
        phase=random.choice(PHASES),
        after_s=round(random.choice((0.0, 0.0, random.uniform(0.0, 1.0))), 3),
        for_s=for_s,
    )


#: what is as in a plain scenario, the simplest first
_LEFT_OUT = (
    "behind_nat",
    "apart",
    "replicas",
    "gateways",
    "data_nodes",
    "min_workers",
    "spare_workers",
    "load_s",
    "latency_s",
    "disk_s",
    "clock_drift",
    "line_bytes_s",
    "slices",
    "rows",
    "samples_a_round",
    "batch_s",
    "checkpoint_every",
)


def simpler(scenario: Scenario) -> list[Scenario]:
    """Scenarios with less in them, the simplest first: one of them may fail in the same way."""
    replace = msgspec.structs.replace
    found = []
    for number in range(len(scenario.faults)):
        faults = scenario.faults[:number] + scenario.faults[number + 1 :]
        found.append(replace(scenario, faults=faults))
    plain = Scenario()
    for name in _LEFT_OUT:
        if getattr(scenario, name) != getattr(plain, name):
            found.append(replace(scenario, **{name: getattr(plain, name)}))
    last = max((fault.round for fault in scenario.faults), default=0)
    if scenario.rounds > last + 2:
        found.append(replace(scenario, rounds=last + 2))
    for number, fault in enumerate(scenario.faults):
        if fault.after_s:
            one = replace(fault, after_s=0.0)
            found.append(
                replace(scenario, faults=(*scenario.faults[:number], one, *scenario.faults[number + 1 :]))
            )
    return found

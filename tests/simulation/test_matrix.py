"""Every role, struck in every way, in every phase of a round, and pairs of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hypha.simulation.scenario import (
    EXECUTOR_WAYS,
    NODE_WAYS,
    PHASES,
    ROLES,
    Phase,
    Role,
    Scenario,
    Strike,
    Way,
)
from hypha.simulation.search import Runner

pytestmark = pytest.mark.simulated

CELLS = [
    (role, way, phase)
    for role in ROLES
    for way in (EXECUTOR_WAYS if role.endswith("executor") else NODE_WAYS)
    for phase in PHASES
    if (role, way) != ("parameter-server-executor", "stall")
] + [(role, "notice", phase) for role in ("worker", "parameter-server") for phase in PHASES]
#: faults that meet while the first is still in force
PAIRS: list[tuple[tuple[Role, Way], tuple[Role, Way]]] = [
    (("parameter-server", "kill"), ("scheduler", "kill")),
    (("parameter-server", "kill"), ("worker", "freeze")),
    (("scheduler", "kill"), ("gateway", "kill")),
    (("scheduler", "kill"), ("worker", "kill")),
    (("scheduler", "full-disk"), ("parameter-server", "kill")),
    (("scheduler", "slow-disk"), ("scheduler", "kill")),
    (("data", "cut"), ("worker", "kill")),
    (("worker", "deaf"), ("parameter-server-executor", "kill")),
    (("worker", "mute"), ("scheduler", "kill")),
    (("training-executor", "kill"), ("scheduler", "kill")),
    (("parameter-server", "lossy"), ("worker", "lossy")),
    (("parameter-server", "slow"), ("scheduler", "freeze")),
]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as one:
        yield one


def struck_at(role: Role, way: Way, phase: Phase, for_s: float = 4.0) -> Strike:
    return Strike(role=role, way=way, round=0 if phase == "loading" else 2, phase=phase, for_s=for_s)


@pytest.mark.parametrize(("role", "way", "phase"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_one_fault(runner: Runner, role: Role, way: Way, phase: Phase) -> None:
    # longer and shorter than liveness and leases, by turns
    for_s = 500.0 if way == "stall" else 4.0 if PHASES.index(phase) % 2 else 14.0
    verdict = runner.run(Scenario(seed=1, rounds=4, faults=(struck_at(role, way, phase, for_s),)))
    assert verdict.problems == (), "\n".join(verdict.log[-60:])


@pytest.mark.parametrize(
    "pair", PAIRS, ids=["+".join(f"{role}-{way}" for role, way in pair) for pair in PAIRS]
)
def test_two_faults(runner: Runner, pair: tuple[tuple[Role, Way], tuple[Role, Way]]) -> None:
    (first, second) = pair
    for after_s in (0.0, 0.4, 2.0):
        faults = (
            struck_at(*first, phase="updating", for_s=6.0),
            Strike(role=second[0], way=second[1], round=2, phase="updating", after_s=after_s, for_s=6.0),
        )
        verdict = runner.run(Scenario(seed=2, rounds=6, faults=faults))
        assert verdict.problems == (), "\n".join(verdict.log[-60:])

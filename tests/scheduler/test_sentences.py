"""What a job waits for, by name, and when it is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import trio
from tests.scheduler.scene import Scene
from trio.testing import MockClock

from hypha import naming
from hypha.scheduler.status.view import Awaiting, awaited
from hypha.simulation.scenario import Scenario
from hypha.simulation.search import Runner


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    before = dict(naming._names)
    naming.learn("a", "worker-1")
    yield
    naming._names.clear()
    naming._names.update(before)


def test_whom_each_phase_waits_for() -> None:
    scene = Scene()
    scene.at(1).leased("ps", "a", "b")
    scene.at(2).joined("ps", "a", "b")
    loading = "b to load the model and for the parameter server ps to load it"
    assert awaited(scene.machine) == f"worker-1 (a), {loading}"
    scene.at(3).loaded("a")
    assert awaited(scene.machine) == loading
    scene.loaded("ps", "b")
    assert awaited(scene.machine) == "worker-1 (a), b waiting"
    scene.at(4).started("a", "b")
    scene.at(5).reported("b", 1)
    assert "worker-1 (a), b at batch 1 of " in awaited(scene.machine)
    scene.trains(4, "a", "b").at(8.5)
    scene.update("a")
    left = awaited(scene.machine)
    assert left.startswith("b at batch 4 of 4 ")
    assert "worker-1" not in left
    scene.update("b")
    assert awaited(scene.machine) == "the outer step of the parameter server ps"


async def test_it_is_said_while_the_job_stands_still_and_only_then(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    awaiting = Awaiting()
    with caplog.at_level(logging.INFO, "hypha.scheduler"):
        for second in range(600):
            # it goes on every 40 s, and stands still from 400 s on
            awaiting.look(min(second, 400) // 40, lambda: "waiting for worker-1")
            await trio.sleep(1.0)
    assert caplog.messages == [
        "For 60 s now: waiting for worker-1.",
        "For 2 min now: waiting for worker-1.",
        "For 3 min now: waiting for worker-1.",
    ]


def test_a_whole_job_that_loads_for_long_says_so() -> None:
    with Runner() as runner:
        verdict = runner.run(Scenario(rounds=1, load_s=150.0))
    # it is found to be slow, as nothing was struck
    assert all("lasted" in problem for problem in verdict.problems)
    log = "\n".join(verdict.log)
    assert "to load the model" in log
    assert "For 60 s now: 0 of 3 workers have the model; the parameter server is loading it" in log
    assert "The executor has been loading its model for" in log

"""Processes of a simulated world freeze and die as real ones do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from hypha.simulation.process import (
    ProcessGone,
    SimulatedProcess,
    SimulatedRuntime,
    Stepping,
    forget_generators,
)

Story = Callable[[SimulatedProcess, list[object]], Awaitable[None]]


def tell(story: Story) -> list[object]:
    """What happened in ``story``, which has a process to itself."""
    seen: list[object] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            runtime = SimulatedRuntime(1, lambda: 0.0, lambda _: 0)
            process = SimulatedProcess("one", runtime, nursery, lambda _, exc: seen.append(exc))
            await story(process, seen)
            process.kill()
        forget_generators()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[Stepping()])
    return seen


async def ticks(seen: list[object]) -> None:
    try:
        while True:
            await trio.sleep(1)
            seen.append(trio.current_time())
    finally:
        seen.append("finally")


def test_frozen_it_does_nothing_and_goes_on_from_there() -> None:
    async def story(process: SimulatedProcess, seen: list[object]) -> None:
        process.spawn(ticks, seen)
        await trio.sleep(2.5)
        process.freeze()
        await trio.sleep(10)
        assert seen == [1, 2]
        process.thaw()
        await trio.sleep(1.1)

    assert tell(story) == [1, 2, 12.5, 13.5]


def test_killed_not_another_instruction_is_executed() -> None:
    async def story(process: SimulatedProcess, seen: list[object]) -> None:
        async def nested() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ticks, seen)
                with trio.CancelScope(shield=True):
                    await trio.sleep(100)

        process.spawn(nested)
        await trio.sleep(1.5)
        process.freeze()
        process.kill()
        await trio.sleep(10)
        assert not process.tasks

    assert tell(story) == [1]


def test_the_dead_cannot_be_frozen() -> None:
    async def story(process: SimulatedProcess, seen: list[object]) -> None:
        process.spawn(ticks, seen)
        await trio.sleep(1.5)
        process.kill()
        # its tasks have not been stepped since; frozen now, they would be parked for good
        process.freeze()
        await trio.sleep(1)
        assert not process.tasks

    assert tell(story) == [1]


def test_a_call_runs_in_the_callee_and_ends_with_it() -> None:
    async def story(process: SimulatedProcess, seen: list[object]) -> None:
        async def double(number: int) -> int:
            await trio.sleep(1)
            return 2 * number

        assert await process.call(double, 21) == 42
        with pytest.raises(ZeroDivisionError):
            await process.call(divide_by_zero)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_gone, process, seen)
            await trio.sleep(1)
            process.kill()
        with pytest.raises(ProcessGone):
            await process.call(double, 1)

    assert tell(story) == ["gone"]


async def divide_by_zero() -> None:
    raise ZeroDivisionError


async def expect_gone(process: SimulatedProcess, seen: list[object]) -> None:
    try:
        await process.call(trio.sleep, 100)
    except ProcessGone:
        seen.append("gone")


def test_children_freeze_and_die_with_their_parent() -> None:
    async def story(process: SimulatedProcess, seen: list[object]) -> None:
        child = SimulatedProcess("child", process.runtime, process.nursery, lambda _, exc: None, process)
        child.spawn(ticks, seen)
        await trio.sleep(1.5)
        process.freeze()
        await trio.sleep(5)
        process.thaw()
        await trio.sleep(0.1)
        process.kill()
        await trio.sleep(5)
        assert not child.alive

    assert tell(story) == [1, 6.5]

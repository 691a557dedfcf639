"""Few transfers at once, of which those in which nothing moves do not count."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import trio
import trio.testing

from hypha.messages import TransferMeta
from hypha.net.bulk.inbound import TRICKLE_BYTES, Inbound
from hypha.net.bulk.turns import MAX_LENT, STILL_S, TransferSlots


class Hall:
    """Holders of places, by name."""

    def __init__(self, count: int, nursery: trio.Nursery) -> None:
        self.places = TransferSlots(count)
        self.nursery = nursery
        self.entered: set[str] = set()
        self.leave: dict[str, trio.Event] = {}
        nursery.start_soon(self.places.run)

    def enter(self, name: str, moved: Callable[[], object]) -> None:
        self.leave[name] = trio.Event()
        self.nursery.start_soon(self._hold, name, moved)

    async def _hold(self, name: str, moved: Callable[[], object]) -> None:
        async with self.places.hold(moved):
            self.entered.add(name)
            await self.leave[name].wait()


def moving() -> Callable[[], object]:
    counter = itertools.count()
    return lambda: next(counter)


async def test_whoever_moves_keeps_its_place(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        hall = Hall(2, nursery)
        for name in "abc":
            hall.enter(name, moving())
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(100 * STILL_S)
        assert hall.entered == {"a", "b"}
        hall.leave["a"].set()
        await trio.testing.wait_all_tasks_blocked()
        assert hall.entered == {"a", "b", "c"}
        nursery.cancel_scope.cancel()


async def test_places_of_the_still_are_lent_and_given_back(autojump_clock: trio.testing.MockClock) -> None:
    marks = {"a": 0, "b": 0}
    async with trio.open_nursery() as nursery:
        hall = Hall(2, nursery)
        for name in marks:
            hall.enter(name, lambda name=name: marks[name])
        await trio.testing.wait_all_tasks_blocked()
        for name in "cde":
            hall.enter(name, moving())
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(STILL_S / 2)
        assert hall.entered == {"a", "b"}
        await trio.sleep(STILL_S)
        assert hall.entered == {"a", "b", "c", "d"}
        # both move again: the next one waits until there are fewer than two
        for _ in range(10):
            marks["a"] += 1
            marks["b"] += 1
            await trio.sleep(STILL_S / 4)
        for name in "cda":
            hall.leave[name].set()
            await trio.testing.wait_all_tasks_blocked()
            assert ("e" in hall.entered) == (name == "a")
            marks["b"] += 1
        nursery.cancel_scope.cancel()


async def test_so_many_are_lent_and_no_more(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        hall = Hall(1, nursery)
        for number in range(2 * MAX_LENT):
            hall.enter(f"{number}", lambda: 0)
        await trio.sleep(100 * STILL_S)
        assert len(hall.entered) == 1 + MAX_LENT
        nursery.cancel_scope.cancel()


async def test_whoever_is_cancelled_leaves_no_place_behind(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        hall = Hall(1, nursery)
        hall.enter("first", moving())
        await trio.testing.wait_all_tasks_blocked()
        # one that waits, and one that has a place
        with trio.move_on_after(1) as waiting:
            async with hall.places.hold(moving()):
                raise AssertionError("there was no place")
        assert waiting.cancelled_caught
        hall.leave["first"].set()
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(1) as holding:
            async with hall.places.hold(moving()):
                await trio.sleep_forever()
        assert holding.cancelled_caught
        hall.enter("a", moving())
        await trio.testing.wait_all_tasks_blocked()
        assert hall.entered == {"first", "a"}
        nursery.cancel_scope.cancel()


def test_a_trickle_does_not_keep_a_place() -> None:
    """Two peers that send a byte a second would keep everybody else's files from being received."""
    link = SimpleNamespace(heard=0)
    meta = TransferMeta(kind="update", name="u", size=1 << 30, blake3="")
    inbound = Inbound(
        token="t" * 16,
        caller="peer",
        meta=meta,
        destination=Path("u"),
    )
    inbound.link = link  # type: ignore[assignment]
    moved, heard = inbound.moved(), inbound.heard()
    link.heard = 100
    assert inbound.heard() != heard
    assert inbound.moved() == moved
    link.heard = TRICKLE_BYTES
    assert inbound.moved() != moved

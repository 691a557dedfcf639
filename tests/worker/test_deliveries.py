"""Sending to several peers: nobody's trouble is another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from hypha.errors import Refused, TransferFailed
from hypha.messages import Delivery, JobStamp, PeerRef, TransferMeta
from hypha.worker.jobs.deliveries import GIVE_UP_AFTER_S, Deliveries

FILE = Path("theta")
A, B, C = (PeerRef(peer=name) for name in "abc")


def meta(round_: int = 0, kind: str = "theta") -> TransferMeta:
    stamp = JobStamp(job_id="job", generation=0, round=round_)
    return TransferMeta(kind=kind, name="theta", size=1, blake3="0", stamp=stamp)


class Wire:
    """``troubles`` by peer: raised one after the other."""

    def __init__(self, **troubles: list[Exception]) -> None:
        self.troubles = troubles
        self.attempts: list[str] = []
        self.slow: dict[str, float] = {}

    async def send(self, peer: PeerRef, path: Path, meta: TransferMeta, patience_s: float) -> None:
        assert patience_s == GIVE_UP_AFTER_S
        self.attempts.append(peer.peer)
        await trio.sleep(self.slow.get(peer.peer, 0.1))
        troubles = self.troubles.get(peer.peer, [])
        if troubles:
            raise troubles.pop(0)


def ok(peer: str) -> Delivery:
    return Delivery(peer=peer, acknowledged=True)


async def test_all_at_once_each_with_its_own_outcome(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire(b=[Refused("stale", "old", "b")], c=[TransferFailed("c", "theta", "cut")])
    found = await Deliveries(wire).deliver(FILE, meta(), [A, B, C], "all")
    (ours, refused, failed) = found
    assert ours == ok("a")
    assert refused == Delivery(peer="b", acknowledged=False, error="stale", detail="old")
    assert (failed.acknowledged, failed.error) == (False, "unreachable")
    # the transfer itself tries again, for as long as it is told to
    assert sorted(wire.attempts) == ["a", "b", "c"]


async def test_duplicate_means_that_it_is_there(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire(a=[Refused("duplicate", "have it", "a")])
    assert await Deliveries(wire).deliver(FILE, meta(), [A], "all") == (ok("a"),)


async def test_one_is_enough_for_strategy_one(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire(a=[Refused("uninvited", "who", "a")])
    found = await Deliveries(wire).deliver(FILE, meta(), [A, B, C], "one")
    assert [delivery.acknowledged for delivery in found] == [False, True]
    assert wire.attempts == ["a", "b"]


async def test_newer_round_overtakes_an_older_one(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire()
    wire.slow["a"] = 1000.0
    deliveries = Deliveries(wire)
    outcomes: dict[int, tuple[Delivery, ...]] = {}

    async def send(round_: int, kind: str = "theta") -> None:
        outcomes[round_] = await deliveries.deliver(FILE, meta(round_, kind), [A, B], "all")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, 1)
        await trio.sleep(10)
        wire.slow.clear()
        await send(2)
        await send(0, "checkpoint")
    assert outcomes[1][0].error == "stale"
    assert outcomes[1][1] == ok("b")
    assert outcomes[2] == (ok("a"), ok("b"))
    assert trio.current_time() < 20


async def test_asked_for_again_it_is_not_sent_twice_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    """A second one would only take the way, and a place, of the first."""
    wire = Wire()
    wire.slow["a"] = 30.0
    deliveries = Deliveries(wire)
    outcomes: list[tuple[Delivery, ...]] = []

    async def send() -> None:
        outcomes.append(await deliveries.deliver(FILE, meta(3), [A], "all"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.sleep(10)
        nursery.start_soon(send)
    assert outcomes == [(ok("a"),), (ok("a"),)]
    assert wire.attempts == ["a"]


async def test_who_asked_again_is_served_when_who_asked_first_has_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wire = Wire()
    wire.slow["a"] = 30.0
    deliveries = Deliveries(wire)
    outcomes: list[tuple[Delivery, ...]] = []
    first = trio.CancelScope()

    async def leave() -> None:
        with first:
            await deliveries.deliver(FILE, meta(3), [A], "all")

    async def stay() -> None:
        outcomes.append(await deliveries.deliver(FILE, meta(3), [A], "all"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
        await trio.sleep(10)
        nursery.start_soon(stay)
        nursery.start_soon(stay)
        await trio.sleep(10)
        first.cancel()
    assert outcomes == [(ok("a"),), (ok("a"),)]
    # the one that was given up, and one for both who stayed
    assert wire.attempts == ["a", "a"]


@pytest.mark.parametrize(
    "later",
    [
        pytest.param(JobStamp(job_id="job", generation=0, round=8, attempt=1), id="another attempt"),
        pytest.param(JobStamp(job_id="job", generation=1, round=5), id="another life of the job"),
    ],
)
async def test_what_is_newer_overtakes(autojump_clock: trio.testing.MockClock, later: JobStamp) -> None:
    wire = Wire()
    wire.slow["a"] = 1000.0
    deliveries = Deliveries(wire)
    outcomes: list[tuple[Delivery, ...]] = []

    async def send(stamp: JobStamp) -> None:
        told = TransferMeta(kind="theta", name="theta", size=1, blake3="0", stamp=stamp)
        outcomes.append(await deliveries.deliver(FILE, told, [A], "all"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, JobStamp(job_id="job", generation=0, round=8))
        await trio.sleep(10)
        wire.slow.clear()
        nursery.start_soon(send, later)
    assert [one.error for (one,) in outcomes] == ["stale", ""]
    assert trio.current_time() < 20


async def test_receiver_that_left_is_given_up_at_once(autojump_clock: trio.testing.MockClock) -> None:
    wire = Wire()
    wire.slow["b"] = GIVE_UP_AFTER_S
    deliveries = Deliveries(wire)
    async with trio.open_nursery() as nursery:

        async def left() -> None:
            await trio.sleep(5)
            deliveries.keep_only("theta", {"a"})

        nursery.start_soon(left)
        found = await deliveries.deliver(FILE, meta(), [A, B], "all")
    assert [delivery.error for delivery in found] == ["", "uninvited"]
    assert trio.current_time() < 6

"""Directives to nodes that refuse, hang up and come back."""

from __future__ import annotations

import trio
from tests.support.network import until
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha.errors import Refused
from hypha.messages import Acknowledged, Members, PeerRef, Plan, Resources, SendModel, Steer
from hypha.scheduler.executors import Steering
from hypha.scheduler.handlers import Seen
from hypha.scheduler.leasing.events import LeaseGained
from hypha.scheduler.rounds.policy import Start
from hypha.scheduler.status.round_traces import RoundTraces


@virtual_time
async def test_the_newest_of_each_kind_arrives_in_order_whatever_is_refused(network: VirtualNetwork) -> None:
    heard: list[Steer] = []
    refusals = ["not-found", "busy", "not-found"]

    async def steer(caller: str, request: Steer) -> Acknowledged:
        if refusals:
            raise Refused(refusals.pop(), "not yet")
        heard.append(request)
        if request.directive == Plan(round=9, batches=9):
            raise Refused("stale", "that round is over")
        return Acknowledged()

    async with network.gateway() as gateway:
        async with network.leaf("scheduler", [gateway]) as scheduler:
            async with network.leaf("worker", [gateway]) as worker, trio.open_nursery() as nursery:
                worker.answer(Steer, steer)
                lease = LeaseGained("l", worker.ref(), Resources(cpu=1), 1.0, "aggregate")
                steering = Steering(scheduler, lease, Start("j", 4), RoundTraces(None))
                scheduler.learn(worker.ref())
                for batches in range(5):
                    steering.put(Plan(round=1, batches=batches))
                steering.put(SendModel(to=PeerRef(peer="a")))
                steering.put(SendModel(to=PeerRef(peer="b")))
                steering.put(Members(peers=()))
                nursery.start_soon(steering.run)
                with trio.fail_after(20):
                    await until(lambda: len(heard) == 4)
                assert [request.directive for request in heard] == [
                    Plan(round=1, batches=4),
                    SendModel(to=PeerRef(peer="a")),
                    SendModel(to=PeerRef(peer="b")),
                    Members(peers=()),
                ]
                # refused for good: forgotten, and what follows is not held up
                steering.put(Plan(round=9, batches=9))
                steering.put(Members(peers=(PeerRef(peer="a"),)))
                await until(lambda: len(heard) == 6)
                seqs = [request.seq for request in heard]
                assert seqs == sorted(set(seqs))
                assert {request.stamp.generation for request in heard} == {4}
                nursery.cancel_scope.cancel()


def test_each_event_is_handled_once_in_any_order() -> None:
    seen = Seen()
    process = ("peer", "train", "one")
    assert [seen.first_time(process, seq) for seq in (1, 3, 2, 3, 1, 4)] == [
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    assert seen.first_time(("peer", "aggregate", "one"), 1)
    for seq in range(5, 3000):
        assert seen.first_time(process, seq)
        assert not seen.first_time(process, seq)
    assert not seen.first_time(process, 4)

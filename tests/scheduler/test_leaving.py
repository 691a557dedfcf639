"""A worker that ends: its schedulers hear of it, hand-overs have the time that there is, leases go back."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from tests.scheduler.test_pool import Worker, held, losses, opened_pool
from tests.support.network import until
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha.config.offers import OfferConfig
from hypha.errors import Refused
from hypha.messages import Acknowledged, WorkerLeaving
from hypha.node import Node
from hypha.scheduler.leasing.events import PoolEvent, WorkerLeaves
from hypha.scheduler.leasing.holding import OVERSTAY_S
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.leasing.renewal import Lapsed
from hypha.worker.leasing.leaving import Leaving
from hypha.worker.leasing.offers import serve_offers
from hypha.worker.leasing.service import LeaseService

#: Expiry would be noticed by no test here.
TERMS = OfferConfig(lease_s=600.0, temporary_lease_s=2.0)


class WatchedLeaving(Leaving):
    """One that says when it has left."""

    def __init__(self, node: Node, lease_service: LeaseService) -> None:
        super().__init__(node, lease_service)
        self.left = trio.Event()

    async def run(self) -> None:
        await super().run()
        self.left.set()


@asynccontextmanager
async def opened_worker(
    network: VirtualNetwork, gateway: Node
) -> AsyncIterator[tuple[Worker, WatchedLeaving]]:
    async with network.leaf("worker", [gateway], roles=("worker",)) as node, trio.open_nursery() as nursery:
        worker = Worker(node, TERMS, 1.0)
        leaving = WatchedLeaving(node, worker.lease_service)
        await nursery.start(serve_offers, node, worker.lease_service)
        nursery.start_soon(leaving.run)
        yield worker, leaving
        nursery.cancel_scope.cancel()


def notices(seen: list[PoolEvent]) -> list[WorkerLeaves]:
    return [event.change for event in seen if isinstance(event.change, WorkerLeaves)]


async def leased(pool: Pool) -> str:
    pool.want("train", 1)
    await until(lambda: held(pool))
    [lease] = pool.leases
    return lease.lease_id


@virtual_time
async def test_another_worker_is_there_before_the_one_that_leaves_is_gone(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (first, first_leaves),
        opened_pool(scheduler) as (pool, seen),
    ):
        lease = await leased(pool)
        async with opened_worker(network, gateway) as (second, _):
            began = trio.current_time()
            first_leaves.begin(10.0, "a test")
            await until(lambda: len(held(pool)) == 2)
            assert held(pool) == {first.node.peer_id, second.node.peer_id}
            assert trio.current_time() < began + 5.0
            assert first_leaves.in_words.startswith("ends in ")
            # the scheduler has no more use of it: it need not wait for its time to be up
            await pool.release(lease)
            await first_leaves.left.wait()
            assert trio.current_time() < began + 6.0
            told = notices(seen)
            assert {one.lease_id for one in told} == {lease}
            assert told[0].left_s == pytest.approx(9.0, abs=0.1)
            assert losses(seen) == []


@virtual_time
async def test_a_lease_is_handed_back_when_the_time_is_up(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (worker, leaving),
        opened_pool(scheduler) as (pool, seen),
    ):
        lease = await leased(pool)
        began = trio.current_time()
        leaving.begin(10.0, "its machine is taken away")
        with trio.move_on_after(7.0):
            await leaving.left.wait()
        # what is trained until then counts
        assert not leaving.left.is_set()
        assert [one.lease_id for one in notices(seen)] == [lease] * 7
        await leaving.left.wait()
        await until(lambda: losses(seen))
        assert trio.current_time() - began < 10.0
        (lost,) = losses(seen)
        assert isinstance(lost, Lapsed)
        assert lost.refused
        assert [one.lease_id for one in worker.ended] == [lease]
        assert "A worker handed its lease back: its machine is taken away." in caplog.text
        assert "expired" not in caplog.text


@virtual_time
async def test_without_leases_a_worker_has_left_at_once_and_makes_no_offers(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (_, leaving),
        opened_pool(scheduler) as (pool, _),
    ):
        leaving.begin(100.0, "a test")
        await leaving.left.wait()
        pool.want("train", 1)
        await trio.sleep(20.0)
        assert held(pool) == set()
        with pytest.raises(Refused, match="cannot be taken back"):
            leaving.resume()


@virtual_time
async def test_drained_it_keeps_its_leases_and_makes_offers_again_when_told(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (worker, leaving),
        opened_pool(scheduler) as (pool, seen),
    ):
        lease = await leased(pool)
        leaving.drain()
        assert leaving.in_words == "is drained, and makes no new offers"
        await trio.sleep(1000.0)
        assert [one.lease_id for one in pool.leases] == [lease]
        await pool.release(lease)
        await trio.sleep(20.0)
        assert worker.is_free
        assert held(pool) == set()
        leaving.resume()
        assert leaving.in_words == "makes offers"
        await until(lambda: held(pool))
        assert losses(seen) == []


@virtual_time
async def test_a_sooner_end_holds_and_a_later_one_changes_nothing(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (_, leaving),
        opened_pool(scheduler) as (pool, _),
    ):
        await leased(pool)
        began = trio.current_time()
        leaving.begin(100.0, "a notice")
        await trio.sleep(1.0)
        leaving.begin(5.0, "SIGTERM")
        leaving.begin(50.0, "too late")
        await leaving.left.wait()
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.3)
        assert leaving.reason == "SIGTERM"


@virtual_time
@pytest.mark.parametrize(("patient", "most_s"), [(False, 0.1), (True, 4.1)])
async def test_a_scheduler_that_does_not_know_the_notice_is_left_to_notice_it_as_ever(
    network: VirtualNetwork, patient: bool, most_s: float
) -> None:
    """Who has a moment only does not spend it on those who cannot hear."""
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (worker, leaving),
        opened_pool(scheduler) as (pool, _),
    ):
        await leased(pool)

        async def refuse(caller: str, leaving: WorkerLeaving) -> Acknowledged:
            raise Refused("malformed", "the request does not decode")

        scheduler.answer(WorkerLeaving, refuse)
        began = trio.current_time()
        leaving.begin(4.0, "a test", patient)
        await leaving.left.wait()
        assert trio.current_time() - began <= most_s
        assert worker.is_free


@virtual_time
async def test_what_another_than_the_leases_worker_says_of_it_changes_nothing(
    network: VirtualNetwork,
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (_, _),
        network.leaf("stranger", [gateway], roles=("worker",)) as stranger,
        opened_pool(scheduler) as (pool, seen),
    ):
        lease = await leased(pool)
        stranger.learn(scheduler.ref())
        for left_s in (0.0, 5.0):
            notice = WorkerLeaving(lease_id=lease, left_s=left_s)
            assert await stranger.request(scheduler.peer_id, notice) == Acknowledged()
        await trio.sleep(20.0)
        assert [one.lease_id for one in pool.leases] == [lease]
        assert pool.missing("train") == 0
        assert (notices(seen), losses(seen)) == ([], [])


@virtual_time
async def test_a_time_that_is_none_is_refused(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (worker, _),
        opened_pool(scheduler) as (pool, _),
    ):
        lease = await leased(pool)
        for left_s in (float("nan"), float("inf"), -1.0):
            with pytest.raises(Refused, match="no time to be left"):
                await worker.node.request(scheduler.peer_id, WorkerLeaving(lease_id=lease, left_s=left_s))


@virtual_time
async def test_a_worker_that_says_so_and_stays_is_given_back_and_cannot_put_it_off(
    network: VirtualNetwork,
) -> None:
    """Else whoever says so for ever has a second worker leased for its place."""
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (worker, _),
        opened_pool(scheduler) as (pool, seen),
    ):
        lease = await leased(pool)
        worker.lease_service.close()
        began = trio.current_time()
        for _ in range(20):
            notice = WorkerLeaving(lease_id=lease, left_s=10.0)
            await worker.node.request(scheduler.peer_id, notice)
            await trio.sleep(1.0)
        assert trio.current_time() > began + 10.0 + OVERSTAY_S
        assert held(pool) == set()
        assert worker.is_free
        assert len(losses(seen)) == 1


@virtual_time
async def test_an_offer_on_the_table_goes_with_its_worker(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, gateway) as (worker, leaving),
        opened_pool(scheduler) as (pool, _),
    ):
        pool.want("train", 1)
        await until(lambda: worker.lease_service.leases)
        assert not worker.lease_service.leases[0].accepted
        leaving.begin(10.0, "a test")
        await leaving.left.wait()
        assert worker.is_free
        await trio.sleep(5.0)
        assert held(pool) == set()

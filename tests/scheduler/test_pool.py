"""Pools and workers: leases gained, kept, lost, given back; rivals; late gateways. What is of the node itself
(roles, revocation, traces, a gateway that is late) is tested over real ones, the rest under a virtual clock.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from tests.support.earlier import earlier_lease_service
from tests.support.network import Network, until
from tests.support.signals import Signals
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha import __version__
from hypha.config.job import JobResourcesConfig, NeedsConfig, PriceConfig
from hypha.config.offers import OfferConfig
from hypha.errors import NetworkError, Refused
from hypha.journal import Journal
from hypha.messages import (
    ExecutorClass,
    ExecutorDescriptor,
    FileList,
    ListFiles,
    ReleaseLease,
    RenewLease,
    Resources,
)
from hypha.naming import shown
from hypha.node import Node
from hypha.pki.authority import revoke
from hypha.pki.identity import load_identity
from hypha.rules.leases import Bind, Lease
from hypha.scheduler.descriptions import searches_for
from hypha.scheduler.leasing.events import Gained, PoolEvent, SearchTimes
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.leasing.renewal import Lapsed, Suspected
from hypha.telemetry import instruments as metrics
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.offers import serve_offers
from hypha.worker.leasing.service import LeaseService
from hypha.worker.leasing.terms import WorkerCapacity

EXECUTORS = (
    ExecutorDescriptor(kind="train", name="diloco-transformer"),
    ExecutorDescriptor(kind="aggregate", name="parameter-server"),
)
NEED = JobResourcesConfig(
    worker=NeedsConfig(cpu=1, memory=1, gpu=0, storage=0),
    parameter_server=NeedsConfig(cpu=1, memory=1, gpu=0, storage=0),
    worker_price=PriceConfig(bid=1.0, max=5.0),
)
#: Leases short enough to see them renewed and expire, under the virtual clock.
TERMS = OfferConfig(lease_s=2.5, temporary_lease_s=2.0)
#: Over real nodes, where a busy machine takes its time.
LONG_TERMS = OfferConfig(lease_s=60.0, temporary_lease_s=10.0)


class Worker:
    """A worker's node and its desk; ``ended`` are the leases it was told to stop."""

    def __init__(self, node: Node, terms: OfferConfig, cpu: float) -> None:
        self.node = node
        self.ended: list[Lease] = []
        arbiter = Arbiter(
            WorkerCapacity(Resources(cpu=cpu, memory=8, storage=1), EXECUTORS),
            terms,
            node.ref,
            journal=Journal(checked=True),
        )
        self.lease_service = LeaseService(arbiter, self.ended.append)

    @property
    def is_free(self) -> bool:
        return self.lease_service.arbiter.book.free == self.lease_service.arbiter.book.total

    def held_for(self, node: Node) -> bool:
        return any(lease.accepted and lease.scheduler == node.peer_id for lease in self.lease_service.leases)


@asynccontextmanager
async def opened_worker(
    network: Network | VirtualNetwork, gateways: Sequence[Node], terms: OfferConfig = TERMS, cpu: float = 1.0
) -> AsyncIterator[Worker]:
    async with network.leaf("worker", gateways, roles=("worker",)) as node, trio.open_nursery() as nursery:
        worker = Worker(node, terms, cpu)
        await nursery.start(serve_offers, node, worker.lease_service)
        yield worker
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def opened_pool(
    node: Node, need: JobResourcesConfig = NEED, pace: SearchTimes | None = None
) -> AsyncIterator[tuple[Pool, list[PoolEvent]]]:
    """A running pool and everything it says."""
    pool = Pool(node, searches_for(need), pace, journal=Journal(checked=True))
    seen: list[PoolEvent] = []

    async def listen() -> None:
        async for event in pool.events:
            seen.append(event)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await nursery.start(pool.run)
        yield pool, seen
        nursery.cancel_scope.cancel()


def held(pool: Pool, kind: ExecutorClass = "train") -> set[str]:
    return {lease.worker.peer for lease in pool.leases if lease.kind == kind}


def losses(seen: list[PoolEvent]) -> list[Lapsed]:
    return [event.change for event in seen if isinstance(event.change, Lapsed)]


@virtual_time
async def test_many_workers_are_leased_and_stay_leased(network: VirtualNetwork) -> None:
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(network.gateway())
        workers = [
            await stack.enter_async_context(opened_worker(network, [gateway], cpu=2.0)) for _ in range(8)
        ]
        scheduler = await stack.enter_async_context(
            network.leaf("scheduler", [gateway], roles=("scheduler",))
        )
        pool, seen = await stack.enter_async_context(opened_pool(scheduler))
        pool.want("train", 8)
        pool.want("aggregate", 1)
        await until(lambda: len(held(pool)) == 8 and len(held(pool, "aggregate")) == 1, 15)
        assert held(pool) == {worker.node.peer_id for worker in workers}
        # whoever listens hears of a lease a moment after the pool has it
        await until(lambda: len({one.lease.lease_id for one in seen if isinstance(one.change, Gained)}) == 9)
        first = {
            lease.lease_id: lease.expires_at for worker in workers for lease in worker.lease_service.leases
        }
        # nothing but renewals lets a lease live that long
        later = {lease_id: until_s + 2.5 for lease_id, until_s in first.items()}
        await until(
            lambda: all(
                lease.expires_at > later.get(lease.lease_id, 0.0)
                for worker in workers
                for lease in worker.lease_service.leases
                if lease.accepted
            ),
            20,
        )
        assert losses(seen) == []
        assert {lease.lease_id for lease in pool.leases} <= set(first)


@virtual_time
async def test_a_dead_worker_is_suspected_soon_then_lost_and_replaced(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_pool(scheduler, pace=SearchTimes(longest_pause_s=0.5)) as (pool, seen),
    ):
        async with opened_worker(network, [gateway]) as doomed:
            peer = doomed.node.peer_id
            pool.want("train", 1)
            await until(lambda: held(pool) == {peer})
        died = trio.current_time()
        await until(lambda: any(isinstance(event.change, Suspected) for event in seen))
        assert held(pool) == {peer}
        await until(lambda: losses(seen))
        assert trio.current_time() - died < TERMS.lease_s
        assert "nobody is there any more" in losses(seen)[0].reason
        assert held(pool) == set()
        async with opened_worker(network, [gateway]) as other:
            await until(lambda: held(pool) == {other.node.peer_id})


@virtual_time
async def test_a_worker_that_forgot_the_lease_is_lost_at_the_next_renewal(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, [gateway]) as worker,
        opened_pool(scheduler) as (pool, seen),
    ):
        pool.want("train", 1)
        await until(lambda: held(pool))
        [lease] = worker.lease_service.leases
        # the scheduler's own courtesy, sent behind the pool's back
        await scheduler.request(worker.node.peer_id, ReleaseLease(lease_id=lease.lease_id))
        assert [one.lease_id for one in worker.ended] == [lease.lease_id]
        await until(lambda: losses(seen))
        [lost] = losses(seen)
        assert isinstance(lost, Lapsed)
        assert "refused (lease)" in lost.reason
        # it is well, so it is taken again
        await until(lambda: held(pool) == {worker.node.peer_id})


@virtual_time
async def test_rivals_the_higher_bid_wins_and_the_other_gets_what_is_left(network: VirtualNetwork) -> None:
    rich_need = NEED.model_copy(update={"worker_price": PriceConfig(bid=3.0, max=5.0)})
    terms = TERMS.model_copy(update={"request_window_s": 0.4})
    pace = SearchTimes(offer_deadline_s=1.0, longest_pause_s=1.0)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(network.gateway())
        workers = [
            await stack.enter_async_context(opened_worker(network, [gateway], terms)) for _ in range(3)
        ]
        nodes = [
            await stack.enter_async_context(network.leaf("scheduler", [gateway], roles=("scheduler",)))
            for _ in range(2)
        ]
        poor, _ = await stack.enter_async_context(opened_pool(nodes[0], NEED, pace))
        rich, _ = await stack.enter_async_context(opened_pool(nodes[1], rich_need, pace))
        poor.want("train", 3)
        rich.want("train", 3)
        await until(lambda: len(held(rich)) == 3)
        assert held(poor) == set()
        assert all(lease.price == 3.0 for lease in rich.leases)
        await rich.close()
        await until(lambda: len(held(poor)) == 3)
        assert all(lease.price == 1.0 for lease in poor.leases)
        assert all(worker.held_for(nodes[0]) for worker in workers)


@virtual_time
async def test_of_two_jobs_that_hold_half_of_what_they_need_one_gives_way_and_is_served_later(
    network: VirtualNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    pace = SearchTimes(longest_pause_s=1.0, yield_after_s=5.0)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(network.gateway())
        workers = [await stack.enter_async_context(opened_worker(network, [gateway])) for _ in range(2)]
        nodes = [
            await stack.enter_async_context(network.leaf("scheduler", [gateway], roles=("scheduler",)))
            for _ in range(2)
        ]
        pools = [await stack.enter_async_context(opened_pool(node, NEED, pace)) for node in nodes]
        for pool, _ in pools:
            pool.want("train", 1)
            await until(lambda pool=pool: len(held(pool)) == 1)
        with caplog.at_level(logging.INFO, logger="hypha.scheduler"):
            # each needs two to begin
            for pool, _ in pools:
                pool.want("train", 2)
            await until(lambda: any(len(held(pool)) == 2 for pool, _ in pools), 60)
        assert "A worker is given back, as there are too few workers to begin" in caplog.text
        (first, kept), (second, gave) = sorted(pools, key=lambda one: -len(held(one[0])))
        assert losses(kept) == []
        await until(lambda: losses(gave))
        [lost] = losses(gave)
        assert isinstance(lost, Lapsed)
        assert lost.refused
        # the other has begun, and keeps what it holds whoever asks for it
        first.begin()
        await trio.sleep(60.0)
        assert len(held(first)) == 2
        assert held(second) == set()
        await first.close()
        await until(lambda: len(held(second)) == 2)
        assert all(len(worker.lease_service.leases) == 1 for worker in workers)


@virtual_time
async def test_losers_are_free_at_once_and_closing_frees_the_others(network: VirtualNetwork) -> None:
    terms = OfferConfig(lease_s=60.0, temporary_lease_s=60.0)
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(network.gateway())
        workers = [
            await stack.enter_async_context(opened_worker(network, [gateway], terms)) for _ in range(3)
        ]
        scheduler = await stack.enter_async_context(
            network.leaf("scheduler", [gateway], roles=("scheduler",))
        )
        pool, seen = await stack.enter_async_context(opened_pool(scheduler))
        pool.want("train", 1)
        await until(lambda: held(pool) and sum(worker.is_free for worker in workers) == 2, 2)
        await pool.close()
        await until(lambda: all(worker.is_free for worker in workers), 1)
        assert sum(len(worker.ended) for worker in workers) == 1
        assert losses(seen) == []
        assert pool.leases == ()


@virtual_time
async def test_a_released_lease_is_replaced_by_another_worker(network: VirtualNetwork) -> None:
    terms = OfferConfig(lease_s=60.0, temporary_lease_s=60.0)
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, [gateway], terms),
        opened_worker(network, [gateway], terms),
        opened_pool(scheduler) as (pool, seen),
    ):
        pool.want("train", 1)
        await until(lambda: held(pool))
        [before] = pool.leases
        await pool.release(before.lease_id, avoid=True)
        await until(lambda: held(pool))
        [after] = pool.leases
        assert after.worker.peer != before.worker.peer
        assert losses(seen) == []
        await pool.release("no such lease")


@virtual_time
async def test_a_worker_hosts_training_and_parameter_server_under_two_leases(network: VirtualNetwork) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(network, [gateway], cpu=2.0) as worker,
        opened_pool(scheduler) as (pool, _),
    ):
        pool.want("train", 1)
        pool.want("aggregate", 1)
        await until(lambda: len(pool.leases) == 2)
        for lease in pool.leases:
            mine = worker.lease_service.granted(Bind(lease.lease_id, scheduler.peer_id, lease.kind, "job"))
            assert mine.job_id == "job"
            with pytest.raises(Refused, match="bound to job"):
                worker.lease_service.granted(Bind(lease.lease_id, scheduler.peer_id, lease.kind, "other"))
            wrong: ExecutorClass = "aggregate" if lease.kind == "train" else "train"
            with pytest.raises(Refused, match="it is for"):
                worker.lease_service.granted(Bind(lease.lease_id, scheduler.peer_id, wrong, "job"))
            with pytest.raises(Refused, match="no lease"):
                worker.lease_service.granted(Bind(lease.lease_id, worker.node.peer_id, lease.kind, "job"))


@virtual_time
async def test_a_scheduler_that_dies_loses_its_leases_without_a_word(network: VirtualNetwork) -> None:
    async with network.gateway() as gateway, opened_worker(network, [gateway]) as worker:
        async with (
            network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
            opened_pool(scheduler) as (pool, _),
        ):
            pool.want("train", 1)
            await until(lambda: held(pool))
            [lease] = worker.lease_service.leases
        assert not worker.is_free
        await until(lambda: worker.is_free)
        assert trio.current_time() >= lease.expires_at
        assert [ended.lease_id for ended in worker.ended] == [lease.lease_id]


@pytest.mark.loopback
async def test_only_schedulers_get_offers_and_renew(real_network: Network) -> None:
    async with (
        real_network.gateway() as gateway,
        real_network.leaf("impostor", [gateway], roles=("worker",)) as impostor,
        real_network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_worker(real_network, [gateway], LONG_TERMS, cpu=2.0) as worker,
        opened_pool(impostor) as (wrong, _),
        opened_pool(scheduler) as (right, _),
    ):
        wrong.want("train", 1)
        right.want("train", 1)
        await until(lambda: held(right))
        [lease] = right.leases
        with pytest.raises(Refused, match="role"):
            await impostor.request(worker.node.ref(), RenewLease(lease_id=lease.lease_id))
        with pytest.raises(Refused, match="role"):
            await impostor.request(worker.node.ref(), ReleaseLease(lease_id=lease.lease_id))
        await until(lambda: all(mine.scheduler == scheduler.peer_id for mine in worker.lease_service.leases))
        assert wrong.leases == ()
        assert held(right) == {worker.node.peer_id}


@pytest.mark.loopback
async def test_everything_may_start_before_its_gateway(real_network: Network) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"/ip4/127.0.0.1/tcp/{port}"
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(
            real_network.leaf("worker", [address], connected=False, roles=("worker",))
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        worker = Worker(node, LONG_TERMS, 1.0)
        await nursery.start(serve_offers, node, worker.lease_service)
        scheduler = await stack.enter_async_context(
            real_network.leaf("scheduler", [address], connected=False, roles=("scheduler",))
        )
        pool, _ = await stack.enter_async_context(opened_pool(scheduler))
        pool.want("train", 1)
        await stack.enter_async_context(real_network.gateway(listen=(address,)))
        await until(lambda: held(pool))


def path_of(signals: Signals, name: str) -> list[str]:
    """The operations above the first span called ``name``, as far as they are of leases, and itself."""
    mine = ("Evaluate request", "Send offer", "Receive offer", "Accept offer", "Renew lease")
    return [one for one in signals.path_to(signals.spans(name)[0]) if one in mine]


@pytest.mark.loopback
async def test_an_offers_way_is_one_trace_and_a_renewal_is_logged_as_it_is_specified(
    real_network: Network, signals: Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hypha.scheduler")
    # a renewal comes after three quarters of it
    terms = OfferConfig(lease_s=8.0, temporary_lease_s=8.0)
    async with (
        real_network.gateway() as gateway,
        opened_worker(real_network, [gateway], terms) as worker,
        real_network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_pool(scheduler) as (pool, _),
    ):
        pool.want("train", 1)
        await until(lambda: len(held(pool)) == 1)
        await until(lambda: len(signals.spans("Renew lease")) >= 1)
        await pool.close()
        await until(lambda: worker.is_free)
    assert path_of(signals, "Accept offer") == [
        "Evaluate request", "Send offer", "Receive offer", "Accept offer"
    ]  # fmt: skip
    assert path_of(signals, "Renew lease") == ["Renew lease"], "it has nothing to do with the offer any more"
    (lease,) = {(one.attributes or {})["hypha.lease"] for one in signals.spans("Accept offer")}
    assert all((one.attributes or {})["hypha.lease"] == lease for one in signals.spans("Renew lease"))
    assert signals.reading(metrics.WORKER_REQUESTS, kind="train") >= 1
    assert signals.reading(metrics.WORKER_OFFERS, outcome="offered") >= 1
    assert len(signals.spans("Publish task advertisement")) >= 1
    renewals = [one for one in caplog.records if one.getMessage() == "Lease renewed successfully"]
    assert len(renewals) >= 2, "the acceptance, and at least one more"
    for record in renewals:
        assert record.levelno == logging.INFO
        assert (vars(record)["worker_peer_id"], vars(record)["lease_id"]) == (worker.node.peer_id, lease)


@pytest.mark.loopback
async def test_a_worker_says_by_a_cause_why_it_does_not_offer(
    real_network: Network, signals: Signals
) -> None:
    floor = LONG_TERMS.model_copy(update={"price": 9.0, "floor": 9.0})
    async with (
        real_network.gateway() as gateway,
        opened_worker(real_network, [gateway], terms=floor),
        opened_worker(real_network, [gateway], LONG_TERMS, cpu=0.5),
        real_network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        opened_pool(scheduler) as (pool, _),
    ):
        pool.want("train", 1)
        await until(lambda: signals.reading(metrics.WORKER_OFFERS, outcome="price") >= 1)
        await until(lambda: signals.reading(metrics.WORKER_OFFERS, outcome="resources") >= 1)
        outcomes = {(one.attributes or {})["hypha.outcome"] for one in signals.spans("Evaluate request")}
        assert outcomes == {"price", "resources"}
        await pool.close()


async def test_a_worker_of_an_earlier_version_is_leased_for_what_it_can_do_and_told_of_the_rest(
    real_network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """It sends the offers that its version sent, over the real wire; the job's training needs more."""
    caplog.set_level(logging.INFO, logger="hypha")
    asks = searches_for(
        NEED, needs={"train": ("multi-label",), "aggregate": ("served-files", "torch-models")}
    )
    async with (
        real_network.gateway() as gateway,
        real_network.leaf("worker", [gateway], roles=("worker",)) as old,
        real_network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        trio.open_nursery() as nursery,
    ):
        ended: list[Lease] = []
        total = Resources(cpu=2, memory=8, storage=1)
        await nursery.start(
            serve_offers,
            old,
            earlier_lease_service(WorkerCapacity(total, EXECUTORS), TERMS, old.ref, ended.append),
        )
        pool = Pool(scheduler, asks, SearchTimes(longest_pause_s=0.5), journal=Journal(checked=True))
        await nursery.start(pool.run)
        pool.want("aggregate", 1)
        pool.want("train", 1)
        await until(lambda: held(pool, "aggregate") == {old.peer_id}, 15)
        assert [lease.version for lease in pool.leases] == [""]
        # it is asked again and again, and its operator and the scheduler's are told once
        declined = "An offer was not taken"
        await until(lambda: sum(declined in one.getMessage() for one in caplog.records) >= 2)
        assert "refused (unsupported): the worker lacks what the job needs (multi-label)" in caplog.text
        assert pool.shortage("aggregate") == ""
        assert pool.shortage("train") == (
            f"{shown(old.peer_id)} offered, but without multi-label: upgrade it to Hypha {__version__} or "
            "later, or leave the multi-label loss out of the job"
        )
        assert held(pool) == set()
        async with opened_worker(real_network, [gateway]) as new:
            await until(lambda: held(pool) == {new.node.peer_id}, 15)
            assert [lease.version for lease in pool.leases if lease.kind == "train"] == [__version__]
        texts = [one.getMessage() for one in caplog.records]
        said = [text for text in texts if "a version of Hypha that states none" in text]
        assert len([text for text in said if "is not given train jobs" in text]) == 1
        assert len([text for text in said if f"this scheduler {__version__}" in text]) == 1
        assert len(said) == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("revoked", ["worker", "scheduler"])
@pytest.mark.loopback
async def test_leases_with_whoever_is_revoked_end_at_once(
    real_network: Network, tmp_path: Path, revoked: str
) -> None:
    """A worker's at its scheduler, and a scheduler's at its worker, long before their time is up."""
    crl = tmp_path / "crl.pem"
    revoke(real_network.pki.org, [], crl)
    files = {role: real_network.pki.files(role, (role,)) for role in ("scheduler", "worker")}
    # the other one hears of it
    told = "scheduler" if revoked == "worker" else "worker"
    files[told] = replace(files[told], crls=crl)
    async with (
        real_network.gateway() as gateway,
        real_network.leaf("scheduler", [gateway], identity=load_identity(files["scheduler"])) as scheduler,
        real_network.leaf("worker", [gateway], identity=load_identity(files["worker"])) as node,
        trio.open_nursery() as nursery,
    ):
        worker = Worker(node, LONG_TERMS, 1.0)
        await nursery.start(serve_offers, node, worker.lease_service)
        async with opened_pool(scheduler) as (pool, seen):
            pool.want("train", 1)
            await until(lambda: held(pool) == {node.peer_id} and worker.held_for(scheduler))
            revoke(real_network.pki.org, [files[revoked].cert], crl)
            if revoked == "worker":
                await until(lambda: held(pool) == set() and losses(seen) != [])
                [lost] = losses(seen)
                assert isinstance(lost, Lapsed)
                assert lost.reason == "its certificate was revoked"
            else:
                await until(lambda: not worker.held_for(scheduler))
                assert len(worker.ended) == 1
        nursery.cancel_scope.cancel()


@virtual_time
async def test_who_share_a_lease_answer_each_other_whatever_others_ask(network: VirtualNetwork) -> None:
    """Six peers use all places that they may, at the worker and at the scheduler: the lease is renewed, and
    what the two ask of each other besides is answered. One without a lease is told ``busy``.
    """
    release = trio.Event()

    async def slow(caller: str, request: ListFiles) -> FileList:
        await release.wait()
        return FileList(files=())

    async def ask(node: Node, of: Node) -> None:
        with suppress(NetworkError):
            await node.request(of.ref(), ListFiles(kind="model"), timeout_s=1000)

    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(network.gateway())
        scheduler = await stack.enter_async_context(
            network.leaf("scheduler", [gateway], roles=("scheduler",))
        )
        worker = await stack.enter_async_context(opened_worker(network, [gateway]))
        pool, seen = await stack.enter_async_context(opened_pool(scheduler))
        flooders = [await stack.enter_async_context(network.leaf(f"f{n}", [gateway])) for n in range(6)]
        pool.want("train", 1)
        await until(lambda: held(pool))
        nursery = await stack.enter_async_context(trio.open_nursery())
        for node, other in ((scheduler, worker.node), (worker.node, scheduler)):
            node.answer(ListFiles, slow)
            for flooder in flooders:
                for _ in range(16):
                    nursery.start_soon(ask, flooder, node)
            await until(lambda node=node: node.answers._shared == 64)  # type: ignore[attr-defined, misc]
            for _ in range(8):
                nursery.start_soon(ask, other, node)
            await until(lambda node=node, other=other: node.answers._inbound[other.peer_id] == 8)  # type: ignore[attr-defined, misc]
        with pytest.raises(Refused, match="busy"):
            await flooders[0].request(scheduler.ref(), ListFiles(kind="model"))
        await trio.sleep(4 * TERMS.lease_s)
        assert held(pool) == {worker.node.peer_id}
        assert losses(seen) == []
        release.set()

"""A pool on a node in memory, under a virtual clock: what becomes of a lease when all happens at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import trio

from hypha.errors import RequestTimeout
from hypha.messages import (
    Acknowledged,
    ExecutorDescriptor,
    LeaseRenewed,
    PeerRef,
    RenewLease,
    Request,
    Resources,
    Response,
    WorkerOffer,
    WorkerRequest,
)
from hypha.node import Changes, Node, PeerLost
from hypha.scheduler.leasing.events import Gained, PoolEvent, Search
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.leasing.renewal import Lapsed

WORKER = PeerRef(peer="worker")
LIFE_S = 10.0
ASK = Search("request", ExecutorDescriptor(kind="train", name="x"), Resources(cpu=1.0), 1.0, 1.0)


class OneWorker:
    """The node of a scheduler as far as a pool needs one, with one worker at the other end: it offers at
    once, and renews its lease once. The next renewal is not answered before the lease's end, and the
    connection breaks meanwhile.
    """

    def __init__(self) -> None:
        self.gateway_changed = Changes()
        self.renewals = 0
        self.released: list[object] = []
        self.broke_at = 0.0
        self._offer: Callable[[str, WorkerOffer], Awaitable[Response]] | None = None
        self._losses, self._watched = trio.open_memory_channel[PeerLost](1)

    def ref(self) -> PeerRef:
        return PeerRef(peer="scheduler")

    def learn(self, ref: PeerRef) -> None:
        assert ref == WORKER

    def prefer(self, is_partner: Callable[[str], bool]) -> None:
        assert not is_partner("worker"), "there is no lease yet"

    def answer(self, kind: type, handler: Callable[..., Awaitable[Response]], roles: object = None) -> None:
        if kind is WorkerOffer:
            self._offer = handler

    @asynccontextmanager
    async def watch_peers(self) -> AsyncIterator[trio.MemoryReceiveChannel[PeerLost]]:
        yield self._watched

    async def publish(self, message: WorkerRequest) -> None:
        assert self._offer is not None
        if self.renewals:
            return
        offer = WorkerOffer(
            lease_id="lease",
            request_id=message.request_id,
            worker=WORKER,
            resources=message.resources,
            price=1.0,
            expires_in_s=5.0,
        )
        await self._offer("worker", offer)

    async def request(self, peer: str, request: Request, timeout_s: float = 10.0) -> Response:
        if not isinstance(request, RenewLease):
            self.released.append(request)
            return Acknowledged()
        self.renewals += 1
        if self.renewals == 1:
            return LeaseRenewed(lease_id="lease", expires_in_s=LIFE_S)
        # renewed at three quarters of its life: the end lies between here and the answer
        await trio.sleep(LIFE_S / 4)
        self.broke_at = trio.current_time()
        self._losses.send_nowait(PeerLost("worker"))
        await trio.sleep(LIFE_S / 4)
        raise RequestTimeout(peer, "RenewLease", timeout_s)


async def test_a_lease_that_ends_during_a_renewal_whose_connection_breaks_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    node = OneWorker()
    pool = Pool(cast(Node, node), [ASK])
    seen: list[PoolEvent] = []
    with trio.fail_after(60.0):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            pool.want("train", 1)
            async for event in pool.events:
                seen.append(event)
                if isinstance(event.change, Gained):
                    gained_at = trio.current_time()
                if isinstance(event.change, Lapsed):
                    break
            lost_at = trio.current_time()
            assert not pool.leases
            # another one is looked for, and the worker told, in case it counts otherwise
            await trio.testing.wait_all_tasks_blocked()
            assert pool.missing("train") == 1
            nursery.cancel_scope.cancel()
    assert [type(event.change) for event in seen] == [Gained, Lapsed]
    assert node.broke_at > 0.0
    assert gained_at + LIFE_S <= lost_at <= gained_at + 1.5 * LIFE_S

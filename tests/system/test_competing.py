"""Two schedulers compete for six workers that ask for different prices and have different resources: who gets
which, at what price, and what becomes of the prices once one of them is gone. Real processes.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import trio
from tests.support.system import SMALL, System, digits_dataset, digits_job, paced

from hypha.cli.local.children import Child
from hypha.decoding import decode_json
from hypha.scheduler.status.snapshot import JobSnapshot, LeaseSnapshot
from hypha.worker.leasing.given import GivenLeases

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

#: of all but the dear one: up to half more where half of it is leased, down to half of it without any lease
FOLLOWS_LOAD = {"every_s": 0.5, "step": 0.5, "low": 0.1, "high": 0.5, "least": 0.5, "most": 1.5}


PATIENCE_S = 30.0


@dataclass(frozen=True)
class Kind:
    """Of worker: how many cores, what it asks for, and whether it takes parameter servers."""

    cpu: int
    price: float
    floor: float = 0.0
    serves: bool = False
    strategy: str = "utilization"


KINDS = {
    # with room for all that two jobs may place there: which of a job's requests comes first is not said
    "cheap": Kind(4, 0.5, serves=True),
    "usual": Kind(4, 1.0, serves=True),
    "small-1": Kind(1, 0.5),
    "small-2": Kind(1, 1.0),
    "dear": Kind(1, 3.0, strategy="flexible"),
    "proud": Kind(4, 1.0, floor=1.5),
}


class Competition:
    """The workers of ``system``, by name and by PeerID."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.workers: dict[str, Child] = {}
        self.names = {system.peer_id(name, "worker"): name for name in KINDS}

    async def start(self) -> None:
        for name, kind in KINDS.items():
            executors = [paced(0.3)]
            if kind.serves:
                executors.append({"class": "aggregate", "name": "parameter-server"})
            offer = {"price": kind.price, "floor": kind.floor, "strategy": kind.strategy}
            self.workers[name] = await self.system.worker(
                name,
                resources={"cpu": kind.cpu, "memory": 64, "storage": 2, "gpu": 0},
                executors=executors,
                offer={**offer, "utilization": FOLLOWS_LOAD},
                http_address="127.0.0.1:0",
            )

    async def given(self, name: str) -> GivenLeases:
        """What the worker itself says."""
        address = await self.system.logged_value(self.workers[name], "http_address")
        async with httpx.AsyncClient(trust_env=False, timeout=30.0) as client:
            return decode_json((await client.get(f"http://{address}/leases")).content, GivenLeases)

    async def asked(self, name: str) -> float:
        price = (await self.given(name)).price
        assert price is not None
        return price.asked

    async def comes_to_ask(self, name: str, price: float) -> None:
        asked = math.nan
        with trio.move_on_after(PATIENCE_S):
            while asked != price:
                asked = await self.asked(name)
                await trio.sleep(0.1)
        assert asked == price, f"{name} still asks for {asked:g} after {PATIENCE_S:g} s"

    def held(self, snapshot: JobSnapshot) -> dict[str, set[str]]:
        """Names of the workers of a job, by what they are for."""
        found: dict[str, set[str]] = defaultdict(set)
        for lease in snapshot.held:
            found[lease.kind].add(self.names[lease.peer])
        return found

    def prices(self, snapshot: JobSnapshot) -> list[tuple[str, LeaseSnapshot]]:
        return [(self.names[lease.peer], lease) for lease in snapshot.held]


def bidding(name: str, workers: int, **price: Any) -> dict[str, Any]:
    job = digits_job(None, workers, 1000, name=name) | {"model": SMALL}
    # a round is over after a quarter of a minute
    job["rounds"]["avg_samples_between_updates"] = 800 * workers
    job["resources"].update(
        worker_price=price, parameter_server_price=price, min_workers=1, start_grace_s=1.0
    )
    return job


async def test_two_schedulers_share_six_workers_by_price_and_prices_fall_back(system: System) -> None:
    used = os.times()
    await system.gateway()
    await system.data("data", digits_dataset(system.root))
    market = Competition(system)
    await market.start()
    rich = await system.job(bidding("rich", 5, bid=2.0, max=2.5, raise_after_s=60.0))
    at_first = await system.reached(rich, lambda seen: len(seen.held) == 6)

    # it bids more than all but one ask for, and pays what it bids; that one is too dear
    held = market.held(at_first)
    assert held["train"] == KINDS.keys() - {"dear"}
    assert held["aggregate"] <= {"cheap", "usual"}
    assert {lease.price for lease in at_first.held} == {2.0}
    # one that is busy asks for more
    await market.comes_to_ask("small-2", 1.5)

    poor = await system.job(bidding("poor", 3, bid=1.0, max=2.0, raise_after_s=3.0, raise_by=0.5))
    await system.logged(poor, "at a bid that was raised to 1.5")
    shared = await system.reached(poor, lambda seen: len(seen.held) == 4)
    held = market.held(shared)
    # there is room beside the other's leases on the large ones; proud takes no bid below 1.5
    assert held["train"] == {"cheap", "usual", "proud"}
    assert held["aggregate"] <= {"cheap", "usual"}
    for name, lease in market.prices(shared):
        bid_at_least = 1.5 if name == "proud" else 1.0
        assert bid_at_least <= lease.price <= 2.0, (name, lease)
        assert lease.price >= KINDS[name].floor
    # nobody lost a lease to the other, and nothing is leased twice
    still = await system.status(rich)
    assert {lease.lease for lease in still.held} == {lease.lease for lease in at_first.held}
    schedulers: dict[str, int] = defaultdict(int)
    for name, kind in KINDS.items():
        given = await market.given(name)
        accepted = [lease for lease in given.leases if lease.state != "temporary"]
        assert sum(lease.resources.cpu for lease in given.leases) + given.free.cpu == kind.cpu
        for lease in accepted:
            schedulers[lease.scheduler] += 1
    assert sorted(schedulers.values()) == [4, 6]

    # one of them is gone: what it held is free, and who has no other lease becomes cheaper than at rest
    await system.stop_job(rich)
    for name in ("small-1", "small-2"):
        await market.comes_to_ask(name, KINDS[name].price / 2)
    assert await market.asked("dear") == 3.0
    kept = await system.status(poor)
    assert {lease.lease for lease in kept.held} == {lease.lease for lease in shared.held}
    await system.stop_job(poor)
    for name, kind in KINDS.items():
        least = kind.price if kind.strategy == "flexible" else max(kind.floor, kind.price / 2)
        await market.comes_to_ask(name, least)
        # what an executor has is reserved until it is gone
        while (given := await market.given(name)).price is not None and given.price.load:
            await trio.sleep(0.1)
        assert given.leases == ()
        assert given.price is not None
    await system.group.stop()
    now = os.times()
    children_s = now.children_user + now.children_system - used.children_user - used.children_system
    print(f"It took {children_s:.1f} s of processor time.")

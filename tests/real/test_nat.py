"""Jobs of which one node sits behind a router that lets nobody in: who is where differs, and which way the
router lets them out. Two networks, each for all jobs of its kind of router.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from tests.real.nat import Place, Sent, behind_nat, sent_by
from tests.support.namespaces import Lab, open_lab
from tests.support.system import SMALL, System, digits_dataset, digits_job, keep_system

from hypha.cli.local.children import Child

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

#: everybody has the first; the others say where a job's part is to be
TRAIN = {"class": "train", "name": "diloco-transformer"}
TRAIN_NEAR = {"class": "train", "name": "near"}
SERVERS = {name: {"class": "aggregate", "name": f"server-{name}"} for name in ("near", "far")}


@dataclass(frozen=True)
class Behind:
    """A network with a router: in the open ``near``, a worker, and ``data``; behind it ``far``, a worker, and
    ``data-far`` with a dataset of its own.
    """

    lab: Lab
    place: Place
    system: System
    nodes: dict[str, Child]


def build(root: Any, gateway_only: bool) -> Iterator[Behind]:
    with open_lab() as lab, keep_system(root) as system:
        place = Place(system, behind_nat(lab, gateway_only))
        nodes: dict[str, Child] = {}

        async def start() -> None:
            await place.gateway()
            near, far = digits_dataset(root), digits_dataset(root, "digits-far")
            nodes["data"] = await system.data("data", near, **place.public("data"))
            nodes["data-far"] = await system.data("data-far", far, **place.inside("data-far"))
            for name, where in (("near", place.public), ("far", place.inside)):
                offered = [TRAIN, SERVERS[name], *([TRAIN_NEAR] if name == "near" else [])]
                nodes[name] = await system.worker(name, executors=offered, **where(name))

        trio.run(start)
        yield Behind(lab, place, system, nodes)


@pytest.fixture(scope="module")
def relaying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """From inside only the gateway can be reached."""
    yield from build(tmp_path_factory.mktemp("relaying"), True)


@pytest.fixture(scope="module")
def dialling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """From inside everybody can be reached."""
    yield from build(tmp_path_factory.mktemp("dialling"), False)


@pytest.fixture
async def relayed(relaying: Behind) -> AsyncIterator[Behind]:
    yield relaying
    await relaying.system.settle()


@pytest.fixture
async def dialled(dialling: Behind) -> AsyncIterator[Behind]:
    yield dialling
    await dialling.system.settle()


@dataclass(frozen=True)
class Ran:
    """A job that has finished: what each node has sent for it, and the PeerIDs of the workers."""

    sent: dict[str, list[Sent]]
    near: str
    far: str


async def run(behind: Behind, name: str, workers: int, rounds: int = 4, **changes: Any) -> Ran:
    """That job; the model is what its ledger says, and all workers of the job had a part in it."""
    system = behind.system
    before = {node: len(list(sent_by(child))) for node, child in behind.nodes.items()}
    dataset = changes.pop("dataset", "digits")
    job = digits_job(None, workers, rounds, name=name) | {"model": SMALL, "dataset": {"dataset": dataset}}
    job["resources"] |= changes
    scheduler = await system.job(job, **behind.place.public(f"{name}-scheduler"))
    assert await system.ended(scheduler) == 0, scheduler.tail()
    near, far = (system.peer_id(node, "worker") for node in ("near", "far"))
    _, ledger = system.ledger(name)
    there = {part.worker for entry in ledger.rounds for part in entry.contributors}
    assert there == ({near, far} if workers == 2 else {near})
    assert await system.replay(name, system.root / f"dataset-{dataset}", None, name) <= 1e-5
    sent = {node: list(sent_by(child))[before[node] :] for node, child in behind.nodes.items()}
    return Ran({**sent, "scheduler": list(sent_by(scheduler))}, near, far)


async def test_a_worker_that_reaches_only_the_gateway(relayed: Behind) -> None:
    """Model, theta, updates and slices: everything goes through the gateway's relay."""
    ran = await run(relayed, "relayed", 2, parameter_server_executor="server-near")
    updates, thetas, slices = (
        [one for one in ran.sent[node] if one.to == to]
        for node, to in (("far", ran.near), ("near", ran.far), ("data", ran.far))
    )
    # one update a round, theta of each round, and some slices
    assert (len(updates), len(thetas)) >= (4, 4)
    assert slices
    assert {one.way for one in (*updates, *thetas, *slices)} == {"stream"}
    # both sides have tried the short way first, in vain
    router = relayed.place.nat.router
    assert relayed.lab.packets(router, "refused_in") > 0
    assert relayed.lab.packets(router, "refused_out") > 0


async def test_a_data_node_that_reaches_only_the_gateway(relayed: Behind) -> None:
    await serves_from_inside(relayed, "stream")


@pytest.mark.parametrize("server", ["near", "far"])
async def test_a_worker_that_may_dial_out(dialled: Behind, server: str) -> None:
    """It dials for what it sends and for what it wants, and is asked to dial for what is sent to it: no file
    goes through the gateway, wherever theta lives.
    """
    ran = await run(dialled, f"{server}-server", 2, parameter_server_executor=f"server-{server}")
    outbound = ran.sent["far"]
    inbound = [one for node in ("near", "data", "scheduler") for one in ran.sent[node] if one.to == ran.far]
    assert len(outbound) >= 4
    assert len(inbound) >= 4
    assert {one.way for one in outbound} == {"direct"}
    assert {one.way for one in inbound} == {"direct", "dial-back"}
    assert {one.way for one in ran.sent["data"] if one.to == ran.far} == {"direct"}
    # it had dialled them, so they did not wait for its address to answer
    logs = dialled.system.root / "logs"
    for log in (dialled.nodes["data"].log, logs / f"{server}-server-scheduler.log"):
        assert "no answer within" not in log.read_text()


async def test_a_data_node_that_may_dial_out(dialled: Behind) -> None:
    await serves_from_inside(dialled, "dial-back")


async def serves_from_inside(behind: Behind, way: str) -> None:
    """A job in the open has its slices from the data node behind the router."""
    keys = {"worker_executor": "near", "parameter_server_executor": "server-near"}
    ran = await run(behind, "data", 1, dataset="digits-far", **keys)
    sent = ran.sent["data-far"]
    assert len(sent) > 4
    assert {one.to for one in sent} == {ran.near}
    assert {one.way for one in sent} == {way}

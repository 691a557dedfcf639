"""Jobs of which one node sits behind a router that lets nobody in."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.real.nat import Place, behind_nat, sent_by
from tests.support.namespaces import Lab
from tests.support.system import System, digits_dataset, digits_job

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

TRAIN = {"class": "train", "name": "diloco-transformer"}
AGGREGATE = {"class": "aggregate", "name": "parameter-server"}


def contributors(system: System) -> set[str]:
    _, ledger = system.ledger("job")
    return {part.worker for entry in ledger.rounds for part in entry.contributors}


async def test_a_worker_that_reaches_only_the_gateway(system: System, lab: Lab, tmp_path: Path) -> None:
    """Model, theta, updates and slices: everything goes through the gateway's relay."""
    nat = behind_nat(lab, gateway_only=True)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    await place.gateway()
    data = await system.data("data", dataset, **place.public("data"))
    near = await system.worker("near", executors=[TRAIN, AGGREGATE], **place.public("near"))
    far = await system.worker("far", executors=[TRAIN], **place.inside("far"))
    scheduler = await system.scheduler(digits_job(None, 2, 4), **place.public("scheduler"))
    assert await system.ended(scheduler) == 0, scheduler.tail()

    far_id, near_id = system.peer_id("far", "worker"), system.peer_id("near", "worker")
    assert contributors(system) == {near_id, far_id}
    assert await system.replay("job", dataset, None) <= 1e-5
    updates, thetas, slices = (
        [one for one in sent_by(child) if one.to == to]
        for child, to in ((far, near_id), (near, far_id), (data, far_id))
    )
    # one update a round, theta of each round, and some slices
    assert (len(updates), len(thetas)) >= (4, 4)
    assert slices
    assert {one.way for one in (*updates, *thetas, *slices)} == {"stream"}
    # both sides have tried the short way first, in vain
    assert lab.packets(nat.router, "refused_in") > 0
    assert lab.packets(nat.router, "refused_out") > 0


@pytest.mark.parametrize("server", ["near", "far"])
async def test_a_worker_that_may_dial_out(system: System, lab: Lab, tmp_path: Path, server: str) -> None:
    """It dials for both directions, so no file goes through the gateway, wherever theta lives."""
    nat = behind_nat(lab, gateway_only=False)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    await place.gateway()
    data = await system.data("data", dataset, **place.public("data"))
    executors = {name: [TRAIN, AGGREGATE] if name == server else [TRAIN] for name in ("near", "far")}
    near = await system.worker("near", executors=executors["near"], **place.public("near"))
    far = await system.worker("far", executors=executors["far"], **place.inside("far"))
    scheduler = await system.scheduler(digits_job(None, 2, 4), **place.public("scheduler"))
    assert await system.ended(scheduler) == 0, scheduler.tail()

    far_id, near_id = system.peer_id("far", "worker"), system.peer_id("near", "worker")
    assert contributors(system) == {near_id, far_id}
    assert await system.replay("job", dataset, None) <= 1e-5
    outbound = list(sent_by(far))
    inbound = [one for child in (near, data, scheduler) for one in sent_by(child) if one.to == far_id]
    assert len(outbound) >= 4
    assert len(inbound) >= 4
    assert {one.way for one in outbound} == {"direct"}
    assert {one.way for one in inbound} == {"dial-back"}
    # it had dialled them, so they did not wait for its address to answer
    assert all("no answer within" not in child.log.read_text() for child in (data, scheduler))


@pytest.mark.parametrize("gateway_only", [True, False])
async def test_a_data_node_behind_nat(system: System, lab: Lab, tmp_path: Path, gateway_only: bool) -> None:
    nat = behind_nat(lab, gateway_only=gateway_only)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    await place.gateway()
    data = await system.data("data", dataset, **place.inside("data"))
    await system.worker("worker", **place.public("worker"))
    scheduler = await system.scheduler(digits_job(None, 1, 4), **place.public("scheduler"))
    assert await system.ended(scheduler) == 0, scheduler.tail()

    assert await system.replay("job", dataset, None) <= 1e-5
    sent = list(sent_by(data))
    assert len(sent) > 4
    assert {one.way for one in sent} == {"stream" if gateway_only else "direct"}

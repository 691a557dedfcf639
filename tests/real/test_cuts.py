"""Gateways that die and cables that are pulled out while a job trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.real.nat import GATEWAY, Place, behind_nat, sent_by
from tests.support.faults import again
from tests.support.namespaces import Lab
from tests.support.polling import until
from tests.support.system import System, digits_dataset, digits_job, paced

from hypha.messages import LedgerFile

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(400)]

TRAIN = {"class": "train", "name": "diloco-transformer"}
#: rounds of a second
PACED = paced(0.07)
AGGREGATE = {"class": "aggregate", "name": "parameter-server"}


#: of a third of a second each while all are there
ROUNDS = 60


def shares(ledger: LedgerFile) -> list[int]:
    """How many workers contributed to each round."""
    return [len({part.worker for part in entry.contributors}) for entry in ledger.rounds]


@pytest.mark.parametrize("relayed", [False, True], ids=["direct", "relayed"])
async def test_one_of_two_gateways_is_killed(system: System, lab: Lab, tmp_path: Path, relayed: bool) -> None:
    """All use the first gateway; one worker can even be reached through a gateway only."""
    nat = behind_nat(lab, gateway_only=True)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    place.public("gateway-1", "gateway-2")
    planned = {name: system.plan_gateway(name, GATEWAY) for name in ("gateway-1", "gateway-2")}
    gateways = {}
    for number, (name, keys) in enumerate(planned.items()):
        others = [address for at, address in enumerate(system.gateways) if at != number]
        gateways[name] = await system.gateway(name, {**keys, "gateway_addresses": others})
    await system.data("data", dataset, **place.public("data"))
    near = await system.worker("near", executors=[TRAIN, AGGREGATE], **place.public("near"))
    spot = place.inside("far") if relayed else place.public("far")
    far = await system.worker("far", executors=[TRAIN], **spot)
    scheduler = await system.scheduler(digits_job(None, 2, 12), **place.public("scheduler"))
    first = system.peer_id("gateway-1", "gateway")
    for child in (near, far, scheduler):
        await system.logged(child, f"Connected to gateway {first}")

    await system.reached(scheduler, lambda snapshot: snapshot.round >= 2)
    gateways["gateway-1"].process.kill()
    assert await system.ended(scheduler) == 0, scheduler.tail()

    second = system.peer_id("gateway-2", "gateway")
    for child in (near, far, scheduler):
        assert f"Connected to gateway {second}" in child.log.read_text()
    _, ledger = system.ledger("job")
    assert len(ledger.rounds) == 12
    assert shares(ledger)[-1] == 2, "both are there in the end"
    assert await system.replay("job", dataset, None) <= 1e-5
    if relayed:
        near_id = system.peer_id("near", "worker")
        assert {one.way for one in sent_by(far) if one.to == near_id} == {"stream"}


@pytest.mark.parametrize("how", ["unplugged", "silent"])
async def test_a_worker_is_cut_off_for_a_while(system: System, lab: Lab, tmp_path: Path, how: str) -> None:
    """Its cable is pulled out, or its packets vanish: the others go on, and it comes back."""
    nat = behind_nat(lab, gateway_only=False)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    await place.gateway()
    await system.data("data", dataset, **place.public("data"))
    await system.worker("server", executors=[AGGREGATE], **place.public("server"))
    for name in ("near-1", "near-2"):
        await system.worker(name, executors=[PACED], **place.public(name))
    await system.worker("far", executors=[PACED], **place.inside("far"))
    job = digits_job(None, 3, ROUNDS)
    # rounds that go on without it take as long as the grace
    job["rounds"] |= {"quorum": 0.6, "grace_s": 2.0, "deadline_s": 10.0}
    job["resources"] |= {"min_workers": 2}
    scheduler = await system.scheduler(job, **place.public("scheduler"))
    await system.logged(scheduler, "of 3 workers", timeout_s=120.0)

    def count(text: str) -> int:
        return scheduler.log.read_text().count(text)

    cut(lab, place, how, True)
    before = count("of 2 workers")
    await until(lambda: count("of 2 workers") > before, 60.0, scheduler.tail)
    cut(lab, place, how, False)
    healed = scheduler.log.read_text().count("of 3 workers")
    await until(
        lambda: (
            scheduler.log.read_text().count("of 3 workers") > healed or scheduler.process.poll() is not None
        ),
        90.0,
        scheduler.tail,
    )
    assert await system.ended(scheduler) == 0, scheduler.tail()

    _, ledger = system.ledger("job")
    assert len(ledger.rounds) == ROUNDS
    far_id = system.peer_id("far", "worker")
    there = [any(part.worker == far_id for part in entry.contributors) for entry in ledger.rounds]
    first = there.index(True)  # its executor may have been ready a little later than the others
    away = there.index(False, first)
    assert any(there[away:]), "it should have come back"
    assert await system.replay("job", dataset, None) <= 1e-5


def cut(lab: Lab, place: Place, how: str, off: bool) -> None:
    """Part the inner network from the rest, or join them again."""
    if how == "unplugged":
        lab.plug(place.nat.router, place.nat.inside, not off)
    elif off:
        lab.rules(
            place.nat.router,
            "table inet cut {\nchain forward {\ntype filter hook forward priority -10; policy drop;\n}\n}\n",
        )
    else:
        lab.rules(place.nat.router, "delete table inet cut")


async def test_all_gateways_die_and_a_relayed_worker_comes_back_through_the_one_that_returns(
    system: System, lab: Lab, tmp_path: Path
) -> None:
    """Who is connected directly trains on; the relayed worker has its circuits again at once."""
    nat = behind_nat(lab, gateway_only=True)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    place.public("gateway-1", "gateway-2")
    planned = {name: system.plan_gateway(name, GATEWAY) for name in ("gateway-1", "gateway-2")}
    gateways = {}
    for number, (name, keys) in enumerate(planned.items()):
        gateways[name] = await system.gateway(
            name, {**keys, "gateway_addresses": [system.gateways[1 - number]]}
        )
    await system.data("data", dataset, **place.public("data"))
    await system.worker("server", executors=[AGGREGATE], **place.public("server"))
    await system.worker("near", executors=[PACED], **place.public("near"))
    far = await system.worker("far", executors=[PACED], **place.inside("far"))
    job = digits_job(None, 2, ROUNDS)
    job["rounds"] |= {"quorum": 0.5, "grace_s": 2.0, "deadline_s": 10.0}
    job["resources"] |= {"min_workers": 1}
    scheduler = await system.scheduler(job, **place.public("scheduler"))
    await system.logged(scheduler, "of 2 workers", timeout_s=120.0)

    for gateway in gateways.values():
        gateway.process.kill()
    struck = await system.status(scheduler)
    alone = await system.reached(scheduler, lambda seen: seen.round >= struck.round + 4)
    assert alone.round < ROUNDS - 10
    await again(system, gateways["gateway-2"], "gateway")
    healed = scheduler.log.read_text().count("of 2 workers")
    await until(
        lambda: (
            scheduler.log.read_text().count("of 2 workers") > healed or scheduler.process.poll() is not None
        ),
        90.0,
        scheduler.tail,
    )
    second = system.peer_id("gateway-2", "gateway")
    assert f"Connected to gateway {second}" in far.log.read_text()
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("job")
    assert len(ledger.rounds) == ROUNDS
    there = shares(ledger)
    assert 2 in there[there.index(1) :], "the relayed worker should have come back"
    server_id = system.peer_id("server", "worker")
    assert {one.way for one in sent_by(far) if one.to == server_id} == {"stream"}
    assert await system.replay("job", dataset, None) <= 1e-5

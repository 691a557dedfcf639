"""Partitions in one direction only: what one side says still arrives, and nothing comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.real.nat import Place, behind_nat
from tests.support.namespaces import Lab
from tests.support.polling import until
from tests.support.system import System, digits_dataset, digits_job, paced

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(280)]

#: rounds of a second
TRAIN = paced(0.08)
AGGREGATE = {"class": "aggregate", "name": "parameter-server"}
SCHEDULER, SERVER = "10.77.0.11", "10.77.0.12"
ROUNDS = 65


@pytest.mark.parametrize(
    ("other", "lost"), [("scheduler", "its"), ("server", "theirs"), ("everybody", "theirs")]
)
async def test_packets_get_lost_in_one_direction(
    system: System, lab: Lab, tmp_path: Path, other: str, lost: str
) -> None:
    """``its``: nothing that the far worker sends arrives there; ``theirs``: nothing comes from there."""
    nat = behind_nat(lab, gateway_only=False)
    for host in (SCHEDULER, SERVER):
        lab.address(nat.public, nat.router, f"{host}/24")
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    await place.gateway()
    await system.data("data", dataset, **place.public("data"))
    await system.worker("server", executors=[AGGREGATE], **place.public("server", host=SERVER))
    for name in ("near-1", "near-2"):
        await system.worker(name, executors=[TRAIN], **place.public(name))
    far = await system.worker("far", executors=[TRAIN], **place.inside("far"))
    job = digits_job(None, 3, ROUNDS)
    job["rounds"] |= {"quorum": 0.6, "grace_s": 2.0, "deadline_s": 10.0}
    job["resources"] |= {"min_workers": 2}
    scheduler = await system.scheduler(job, **place.public("scheduler", host=SCHEDULER))
    await system.logged(scheduler, "of 3 workers", timeout_s=120.0)

    towards = {"scheduler": SCHEDULER, "server": SERVER, "everybody": "10.77.0.0/24"}[other]
    direction = f"ip daddr {towards}" if lost == "its" else f'ip saddr {towards} oifname "to-inside"'
    lab.rules(
        nat.router,
        "table inet oneway {\ncounter lost {}\nchain forward {\n"
        "type filter hook forward priority -10; policy accept;\n"
        f"{direction} counter name lost drop\n}}\n}}\n",
    )
    struck = await system.status(scheduler)
    # the others go on, whether or not a way around is found
    await system.reached(scheduler, lambda seen: seen.round >= struck.round + 3, timeout_s=60.0)
    # and the worker has noticed: files take another way, connections are cut
    noticed = "reached by way of stream" if other == "server" else "nothing was heard for"
    await system.logged(far, noticed, timeout_s=60.0)
    before = await system.status(scheduler)
    assert before.generation == 0
    assert before.round < ROUNDS - 5, "the job is nearly over: nothing is left for the worker to come back to"
    lab.rules(nat.router, "delete table inet oneway")

    def whole() -> int:
        return scheduler.log.read_text().count("of 3 workers")

    healed = whole()
    await until(lambda: whole() > healed or scheduler.process.poll() is not None, 90.0, scheduler.tail)
    assert whole() > healed, "it should have come back"
    assert await system.ended(scheduler) == 0, scheduler.tail()
    _, ledger = system.ledger("job")
    assert len(ledger.rounds) == ROUNDS
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert await system.replay("job", dataset, None) <= 1e-5

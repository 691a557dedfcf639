"""Gateways that die and cables that are pulled out while a job trains."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from tests.real.nat import GATEWAY, Place, behind_nat, sent_by
from tests.support.faults import again, durations
from tests.support.namespaces import Lab, inside
from tests.support.polling import until
from tests.support.system import SMALL, System, digits_dataset, digits_job, paced

from hypha.cli.local.children import Child
from hypha.messages import LedgerFile
from hypha.naming import shown

pytestmark = [pytest.mark.real, pytest.mark.fault, pytest.mark.timeout(400)]

#: rounds of a second
PACED = paced(0.07)
AGGREGATE = {"class": "aggregate", "name": "parameter-server"}
SCHEDULER, SERVER = "10.77.0.11", "10.77.0.12"
#: more rounds than any job here lives to see: it is stopped
ENDLESS = 10_000


def shares(ledger: LedgerFile) -> list[int]:
    """How many workers contributed to each round."""
    return [len({part.worker for part in entry.contributors}) for entry in ledger.rounds]


async def two_gateways(system: System, place: Place) -> dict[str, Child]:
    """They know each other; both listen, so that everybody takes the first."""
    place.public("gateway-1", "gateway-2")
    planned = {name: system.plan_gateway(name, GATEWAY) for name in ("gateway-1", "gateway-2")}
    gateways = {}
    for number, (name, keys) in enumerate(planned.items()):
        keys["gateway_addresses"] = [system.gateways[1 - number]]
        gateways[name] = await system.gateway(name, keys)
    for child in gateways.values():
        await system.logged_value(child, "addresses")
    return gateways


@dataclass(frozen=True)
class Cut:
    """How the inner network is parted from the rest: its cable is pulled out, or the router drops packets.
    ``noticed`` is what the worker in there says once it knows; ``alone``: nobody can hear of it meanwhile;
    ``direct``: only who has a connection with this host notices anything.
    """

    rule: str | None
    noticed: str
    alone: bool = False
    direct: str | None = None


_SILENCE = "nothing was heard for"
CUTS = {
    "the cable is pulled out": Cut(None, _SILENCE, alone=True),
    "all packets vanish": Cut("drop", _SILENCE, alone=True),
    # in one direction: what one side says still arrives, and nothing comes back
    "the scheduler hears nothing": Cut(f"ip daddr {SCHEDULER} drop", _SILENCE, direct=SCHEDULER),
    "nothing is heard from the parameter server": Cut(
        f'ip saddr {SERVER} oifname "to-inside" drop', "reached by way of stream"
    ),
    "nothing is heard from anybody": Cut('ip saddr 10.77.0.0/24 oifname "to-inside" drop', _SILENCE),
}


async def test_a_worker_is_cut_off_in_every_way_and_comes_back(
    system: System, lab: Lab, tmp_path: Path
) -> None:
    """The others go on each time, whether or not the worker finds a way around."""
    nat = behind_nat(lab, gateway_only=False)
    for host in (SCHEDULER, SERVER):
        lab.address(nat.public, nat.router, f"{host}/24")
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    await place.gateway()
    await system.data("data", dataset, **place.public("data"))
    await system.worker("server", executors=[AGGREGATE], **place.public("server", host=SERVER))
    for name in ("near-1", "near-2"):
        await system.worker(name, executors=[PACED], **place.public(name))
    far = await system.worker("far", executors=[PACED], **place.inside("far"))
    job = digits_job(None, 3, ENDLESS) | {"model": SMALL}
    # rounds that go on without it take as long as the grace
    job["rounds"] |= {"quorum": 0.6, "grace_s": 2.0, "deadline_s": 10.0}
    job["resources"] |= {"min_workers": 2}
    scheduler = await system.scheduler(job, **place.public("scheduler", host=SCHEDULER))

    async def a_round_of(crew: int) -> None:
        """One that is yet to come."""
        text = f"of {crew} workers"
        before = scheduler.log.read_text().count(text)
        await until(lambda: scheduler.log.read_text().count(text) > before, 120.0, scheduler.tail)

    await a_round_of(3)
    for name, cut in CUTS.items():
        # one through the relay may have been the first to come back after the cut before, and then it stays
        concerned = cut.direct is None or await connected(nat.inside, cut.direct)
        struck, seen = trio.current_time(), await system.status(scheduler)
        said = far.log.read_text().count(cut.noticed)
        part(lab, place, cut, True)
        if cut.alone:
            await a_round_of(2)
        if concerned:
            await until(
                lambda said=said, cut=cut: far.log.read_text().count(cut.noticed) > said, 60.0, far.tail
            )
        else:
            await a_round_of(3)
        noticed = trio.current_time()
        await system.reached(scheduler, lambda now, seen=seen: now.round >= seen.round + 3, timeout_s=60.0)
        part(lab, place, cut, False)
        healed = trio.current_time()
        await a_round_of(3)
        notice = (
            f"noticed after {noticed - struck:.1f} s" if concerned else "noticed by nobody, behind the relay"
        )
        print(
            f"{name}: {notice}, healed after {healed - struck:.1f} s, "
            f"there again {trio.current_time() - healed:.1f} s later"
        )
    await system.stop_job(scheduler)
    _, ledger = system.ledger("job")
    print(durations(ledger))
    assert {entry.generation for entry in ledger.rounds} == {0}
    assert [entry.round for entry in ledger.rounds] == list(range(len(ledger.rounds)))
    assert {2, 3} <= set(shares(ledger))
    assert await system.replay("job", dataset, None) <= 1e-5


async def connected(place: str, host: str) -> bool:
    """Whether ``place`` has a TCP connection with ``host`` now."""
    wanted = socket.inet_aton(host)[::-1].hex().upper()

    def look() -> bool:
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[2].startswith(f"{wanted}:") and line.split()[3] == "01" for line in lines)

    return await inside(place, look)


def part(lab: Lab, place: Place, cut: Cut, off: bool) -> None:
    """Part the inner network from the rest, or join them again."""
    if cut.rule is None:
        lab.plug(place.nat.router, place.nat.inside, not off)
    elif off:
        lab.rules(
            place.nat.router,
            "table inet cut {\nchain forward {\n"
            f"type filter hook forward priority -10; policy accept;\n{cut.rule}\n}}\n}}\n",
        )
    else:
        lab.rules(place.nat.router, "delete table inet cut")


async def test_one_gateway_dies_then_all_and_one_returns(system: System, lab: Lab, tmp_path: Path) -> None:
    """All use the first gateway, and go over to the second when it dies. When both are dead, who is connected
    directly trains on; the worker that can be reached through a gateway only has its circuits again at once
    when one returns.
    """
    nat = behind_nat(lab, gateway_only=True)
    place = Place(system, nat)
    dataset = digits_dataset(tmp_path)
    gateways = await two_gateways(system, place)
    await system.data("data", dataset, **place.public("data"))
    server = await system.worker("server", executors=[AGGREGATE], **place.public("server"))
    near = await system.worker("near", executors=[PACED], **place.public("near"))
    far = await system.worker("far", executors=[PACED], **place.inside("far"))
    job = digits_job(None, 2, ENDLESS) | {"model": SMALL}
    job["rounds"] |= {"quorum": 0.5, "grace_s": 2.0, "deadline_s": 10.0}
    job["resources"] |= {"min_workers": 1}
    scheduler = await system.scheduler(job, **place.public("scheduler"))
    nodes = (server, near, far, scheduler)

    async def both(text: str = "of 2 workers") -> None:
        """A round of both workers that is yet to come."""
        before = scheduler.log.read_text().count(text)
        await until(lambda: scheduler.log.read_text().count(text) > before, 120.0, scheduler.tail)

    async def connected_with(name: str) -> None:
        line = f"Connected to gateway {shown(system.peer_id(name, 'gateway'), name)}"
        for child in nodes:
            await system.logged(child, line)

    await connected_with("gateway-1")
    await both()
    gateways["gateway-1"].process.kill()
    await connected_with("gateway-2")
    await both()
    assert {entry.generation for entry in system.ledger("job")[1].rounds} == {0}

    gateways["gateway-2"].process.kill()
    struck = await system.status(scheduler)
    await system.reached(scheduler, lambda seen: seen.round >= struck.round + 4)
    await again(system, gateways["gateway-2"], "gateway")
    await both()
    await system.stop_job(scheduler)
    _, ledger = system.ledger("job")
    print(durations(ledger))
    there = shares(ledger)
    assert 1 in there, "the relayed worker cannot have been there all the time"
    assert [entry.round for entry in ledger.rounds] == list(range(len(ledger.rounds)))
    server_id = system.peer_id("server", "worker")
    assert {one.way for one in sent_by(far) if one.to == server_id} == {"stream"}
    assert await system.replay("job", dataset, None) <= 1e-5

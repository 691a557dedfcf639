"""The long-lived report stream."""

from __future__ import annotations

import pytest
from tests.support.network import Network, address_of, until
from tests.support.stopwatch import Stopwatch

from hypha.messages import JobStamp, PeerRef, Progress, Report
from hypha.net import reports

pytestmark = pytest.mark.loopback


def report(batches: int, round_: int = 0, job: str = "job") -> Report:
    progress = Progress(round=round_, batches=batches, samples=0, busy_s=0.0, loss=0.0)
    return Report(stamp=JobStamp(job_id=job, round=round_), incarnation="i", progress=progress)


async def test_only_the_newest_of_a_round_is_sent_over_one_stream(network: Network) -> None:
    batches: list[list[Report]] = []
    callers: set[str] = set()

    def arrived(caller: str, arriving: list[Report]) -> None:
        callers.add(caller)
        batches.append(arriving)

    async with network.leaf("worker") as worker, network.leaf("scheduler") as scheduler:
        scheduler.answer_reports(arrived)
        worker.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
        for number in range(1000):
            worker.report(scheduler.peer_id, report(number))
            worker.report(scheduler.peer_id, report(number, round_=1))
        await until(lambda: batches)
        assert [one.progress.batches for one in batches[0]] == [999, 999]
        worker.report(scheduler.peer_id, report(1000))
        await until(lambda: len(batches) == 2)
        assert [one.progress.batches for one in batches[1]] == [1000]
        assert callers == {worker.peer_id}


async def test_reports_survive_a_broken_connection(network: Network) -> None:
    newest = -1

    def arrived(caller: str, arriving: list[Report]) -> None:
        nonlocal newest
        newest = max(newest, *(one.progress.batches for one in arriving))

    async with network.leaf("worker") as worker, network.leaf("scheduler") as scheduler:
        scheduler.answer_reports(arrived)
        worker.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
        worker.report(scheduler.peer_id, report(1))
        await until(lambda: newest == 1)
        await scheduler.disconnect(worker.peer_id)
        await until(lambda: not worker.is_connected(scheduler.peer_id))
        worker.report(scheduler.peer_id, report(2))
        await until(lambda: newest == 2)


async def test_a_report_that_cannot_be_sent_ends_nobody(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    arrived: list[int] = []
    async with network.leaf("worker") as worker, network.leaf("scheduler") as scheduler:
        scheduler.answer_reports(lambda caller, reports: arrived.extend(r.progress.batches for r in reports))
        worker.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
        # MessagePack has integers of 64 bits
        worker.report(scheduler.peer_id, report(1, round_=1 << 70))
        await until(lambda: "are lost" in caplog.text)
        worker.report(scheduler.peer_id, report(2))
        await until(lambda: arrived == [2])


async def test_reports_to_nobody_block_nobody(network: Network) -> None:
    async with network.leaf("worker") as worker:
        started = Stopwatch()
        for number in range(10_000):
            worker.report(network.pki.identity("x").peer_id if number == 0 else "nobody", report(number))
        assert started.elapsed_s() < 1


async def test_reports_need_their_role(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    arrived: list[str] = []
    async with (
        network.leaf("data", roles=("data",)) as data,
        network.leaf("worker", roles=("worker",)) as worker,
        network.leaf("scheduler") as scheduler,
    ):
        scheduler.answer_reports(lambda caller, reports: arrived.append(caller))
        for node in (data, worker):
            node.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
            node.report(scheduler.peer_id, report(1))
        await until(lambda: arrived and "Refused a stream of /hypha/report/1" in caplog.text)
        assert set(arrived) == {worker.peer_id}


async def test_whoever_is_gone_for_good_is_forgotten(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "IDLE_S", 0.3)
    async with network.leaf("worker") as worker:
        nobody = PeerRef(peer="12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")
        worker.report(nobody.peer, report(1))
        tasks = worker._reports._wakers
        assert list(tasks) == [nobody.peer]
        await until(lambda: not tasks)

"""The ledger: durable, replayable, resumable."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from tests.support.polling import until

from hypha.config.job import DatasetRef, JobConfig, ModelConfig
from hypha.errors import HyphaError
from hypha.messages import (
    Contribution,
    HuggingFace,
    LedgerFile,
    LedgerRound,
    Manifest,
    PeerRef,
    Resources,
    SliceInfo,
    SliceRange,
    UpdateStatistics,
)
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.descriptions import described
from hypha.scheduler.durable.database import left_behind
from hypha.scheduler.durable.ledger import Ledger, Standing, export_ledger, open_ledger, read_ledger
from hypha.scheduler.leasing.events import LeaseGained

MANIFEST = Manifest(name="d", columns=(), slices=(SliceInfo(file="a", samples=4, size=1, blake3="00"),))


def opening() -> Standing:
    config = JobConfig(
        model=ModelConfig(type="causal-lm", repository="org/model", token="secret"),
        dataset=DatasetRef(dataset="d"),
        output="out",
    )
    train, aggregate = described(config, PeerRef(peer="s", addresses=("/ip4/1.2.3.4",)), "job-1")
    return Standing(job_id="job-1", train=train, aggregate=aggregate, manifest_hash="h")


def entry(round_: int, generation: int = 0, workers: str = "ab") -> LedgerRound:
    parts = tuple(
        Contribution(
            round=round_,
            worker=worker,
            incarnation="i",
            samples=8,
            batches=2,
            batch_size=4,
            steps=2 * round_,
            ranges=(SliceRange(epoch=0, slice=0, start=0, stop=4),),
            finished=((0, 0),),
            loss=1.5,
        )
        for worker in workers
    )
    return LedgerRound(
        round=round_,
        theta=f"t{round_ + 1}",
        contributors=parts,
        generation=generation,
        samples=8 * len(parts),
        loss=1.5,
        duration_s=2.0,
    )


async def test_what_was_written_is_read_and_exported(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "job.db")
    tracker = SliceTracker([4]).to_state()
    await ledger.run(Ledger.open_job, opening(), MANIFEST, tracker)
    await ledger.run(Ledger.first_theta, "t0")
    await ledger.run(Ledger.record, entry(0), tracker, 2)
    await ledger.run(Ledger.record, entry(1), tracker, 4)
    file = await ledger.run(Ledger.to_file)
    ledger.close()
    assert [part.round for part in file.rounds] == [0, 1]
    assert len(file.rounds[0].contributors) == 2
    assert file.theta == "t0"
    assert read_ledger(tmp_path / "job.db") == file
    export_ledger(file, tmp_path / "ledger.json")
    assert read_ledger(tmp_path / "ledger.json") == file
    assert b"secret" not in (tmp_path / "job.db").read_bytes() + (tmp_path / "ledger.json").read_bytes()
    assert isinstance(file.job.model.source, HuggingFace)


async def test_a_later_life_discards_and_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "job.db")
    tracker = SliceTracker([4]).to_state()
    await ledger.run(Ledger.open_job, opening(), MANIFEST, tracker)
    for round_ in range(4):
        await ledger.run(Ledger.record, entry(round_), tracker, 2 * round_ + 2)
        if round_ == 1:
            await ledger.run(Ledger.checkpoint, 2, "scheduler")
    starts = await ledger.run(Ledger.starts)
    assert [(start.round, start.steps, start.place) for start in starts] == [(2, 4, "scheduler"), (0, 0, "")]
    await ledger.run(Ledger.begin_generation, 1, 2, tracker)
    await ledger.run(Ledger.record, entry(2, generation=1), tracker, 6)
    file = await ledger.run(Ledger.to_file)
    assert [(part.round, part.generation, part.discarded) for part in file.rounds] == [
        (0, 0, False),
        (1, 0, False),
        (2, 0, True),
        (3, 0, True),
        (2, 1, False),
    ]
    ledger.close()
    again = Ledger(tmp_path / "job.db")
    standing = await again.run(Ledger.standing)
    assert standing is not None
    assert (standing.generation, standing.state) == (1, "running")
    assert await again.run(Ledger.published) is None
    await again.run(Ledger.done, "/models/digits", "models/digits")
    assert await again.run(Ledger.published) == ("/models/digits", "models/digits")
    assert (await again.run(Ledger.standing)).state == "done"  # type: ignore[union-attr]
    again.close()


async def test_a_thousand_rounds_stay_small(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "job.db")
    tracker = SliceTracker([4]).to_state()
    await ledger.run(Ledger.open_job, opening(), MANIFEST, tracker)
    for round_ in range(1000):
        await ledger.run(Ledger.record, entry(round_), tracker, round_)
    with sqlite3.connect(tmp_path / "job.db") as db:
        assert db.execute("SELECT COUNT(*) FROM starts").fetchone()[0] < 12
    db.close()
    ledger.close()
    # what each worker contributed, and nothing that grows
    assert (tmp_path / "job.db").stat().st_size < 1000 * 1500


@pytest.mark.parametrize("name", ["job.db", "ledger.json"])
def test_what_is_no_ledger_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(HyphaError, match="no ledger"):
        read_ledger(tmp_path / name)
    (tmp_path / name).write_bytes(b"certainly not" * 100)
    with pytest.raises(HyphaError, match=name):
        read_ledger(tmp_path / name)


def test_the_file_is_plain_json_with_the_promised_fields(tmp_path: Path) -> None:
    what = opening()
    file = LedgerFile(
        job=what.train,
        aggregate=what.aggregate,
        manifest=MANIFEST,
        manifest_hash="h",
        theta="t0",
        rounds=(entry(0),),
    )
    export_ledger(file, tmp_path / "ledger.json")
    raw = msgspec.json.decode((tmp_path / "ledger.json").read_bytes())
    assert raw["rounds"][0]["contributors"][0]["ranges"] == [{"epoch": 0, "slice": 0, "start": 0, "stop": 4}]
    assert raw["job"]["type"] == "train"
    assert raw["aggregate"]["type"] == "aggregate"
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]


def lease(lease_id: str, peer: str) -> LeaseGained:
    worker = PeerRef(peer=peer, addresses=(f"/ip4/10.0.0.1/tcp/{peer}",))
    return LeaseGained(lease_id, worker, Resources(cpu=2, memory=1.5), 0.5, "train")


async def test_leases_of_a_killed_scheduler_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "job.db"
    assert (await left_behind(path)).leases == ()
    ledger = Ledger(path)
    one, two, three = lease("l1", "1"), lease("l2", "2"), lease("l3", "2")
    for held in (one, two, three):
        ledger.lease_gained(held)
    ledger.lease_ended("l2")
    ledger.lease_ended("never held")
    ledger.close()
    assert (await left_behind(path)).leases == (one, three)
    later = Ledger(path)
    assert later.leases() == [one, three]
    later.lease_ended()
    assert later.leases() == []
    later.close()


async def test_the_open_round_and_its_slices_outlive_the_scheduler(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "job.db")
    tracker = SliceTracker([4, 4, 4])
    await ledger.run(Ledger.open_job, opening(), MANIFEST, tracker.to_state())
    assert await ledger.run(Ledger.open_round) == (0, 0, "")
    await ledger.run(Ledger.first_theta, "t0")
    assert await ledger.run(Ledger.open_round) == (0, 0, "t0")
    tracker.next("a", "life", 1)
    tracker.next("b", "life", 1)
    await ledger.run(Ledger.keep_slices, tracker.to_state())
    again = SliceTracker.from_state(await ledger.run(Ledger.slices))
    assert (again.held("a"), again.held("b")) == ([(0, 0)], [(0, 1)])
    assert again.next("a", "life", 1).index == 0
    tracker.finish("a", [(0, 0)])
    await ledger.run(Ledger.record, entry(0), tracker.to_state(), 2)
    assert await ledger.run(Ledger.open_round) == (1, 2, "t1")
    kept = await ledger.run(Ledger.slices)
    assert (kept.epochs[0].used, kept.epochs[0].assigned) == ((0,), ((1, "b"),))
    # from a checkpoint nobody holds anything
    (start,) = [one for one in await ledger.run(Ledger.starts) if one.round == 0]
    assert start.tracker.epochs == ()
    ledger.close()


async def test_a_full_disk_is_waited_out_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "job.db")
    await ledger.run(Ledger.open_job, opening(), MANIFEST, SliceTracker((4,)).to_state())
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    written: list[int] = []

    async def write() -> None:
        for round_ in range(40):
            await ledger.run(Ledger.record, entry(round_), SliceTracker((4,)).to_state(), 2)
            written.append(round_)

    with caplog.at_level(logging.INFO, logger="hypha.scheduler"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await until(lambda: "stands still" in caplog.text)
            stood = len(written)
            assert stood < 40
            # whoever waits can be told to stop
            with trio.move_on_after(0.1) as scope:
                await ledger.run(Ledger.record, entry(99), SliceTracker((4,)).to_state(), 2)
            assert scope.cancelled_caught
            assert len(written) == stood
            ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert [one.round for one in (await ledger.run(Ledger.to_file)).rounds] == list(range(40))
    ledger.close()
    assert str(tmp_path / "job.db") in caplog.text
    assert "can be written again" in caplog.text


async def test_a_scheduler_that_is_started_on_a_full_disk_waits_too(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    path = tmp_path / "job.db"
    ledger = Ledger(path)
    ledger.lease_gained(lease("l1", "1"))
    ledger.close()
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    troubles = [full, full]
    real = sqlite3.connect

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        if troubles:
            raise troubles.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)
    with caplog.at_level(logging.INFO, logger="hypha.scheduler"):
        # not taken for a ledger without leases
        assert (await left_behind(path)).leases == (lease("l1", "1"),)
        assert caplog.text.count("stands still") == caplog.text.count("can be written again") == 1
        troubles = [full]
        again = await open_ledger(path)
        assert caplog.text.count("stands still") == caplog.text.count("can be written again") == 2
    assert again.leases() == [lease("l1", "1")]
    again.close()
    path.write_bytes(b"this is no database, and much longer than its header is, which is a hundred bytes" * 9)
    with pytest.raises(HyphaError, match="cannot be opened"):
        await open_ledger(path)


async def test_rounds_of_an_earlier_version_are_read_and_what_is_measured_now_is_kept(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "job.db")
    tracker = SliceTracker([4]).to_state()
    await ledger.run(Ledger.open_job, opening(), MANIFEST, tracker)
    await ledger.run(Ledger.record, entry(0), tracker, 2)
    measured = UpdateStatistics(worker="a", norm=2.0, cosine=0.5, size_bytes=100)
    await ledger.run(Ledger.record, msgspec.structs.replace(entry(1), updates=(measured,)), tracker, 4)
    (old,) = ledger._db.execute("SELECT entry FROM rounds WHERE round = 0").fetchone()
    assert "updates" not in old  # what an earlier version has written looks like this
    file = await ledger.run(Ledger.to_file)
    ledger.close()
    assert [one.updates for one in file.rounds] == [(), (measured,)]


def test_what_a_worker_had_under_its_last_lease_is_remembered_beside_its_speed(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "job.db")) as ledger:
        worker = PeerRef(peer="W")
        ledger.lease_gained(LeaseGained("l1", worker, Resources(cpu=2), 1.0, "train"))
        ledger.lease_gained(LeaseGained("l2", worker, Resources(cpu=64), 1.0, "aggregate"))
        ledger.lease_ended()
        ledger.failed("W", "its executor failed")
        [known] = ledger.track_records()
    assert (known.worker, known.capacity) == ("W", 2.0)

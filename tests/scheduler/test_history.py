"""The history of rounds: what it makes of a job's journal, what is durable of it, what it costs at most."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest
import trio
from tests.scheduler.test_ledger import MANIFEST, entry, opening
from tests.scheduler.test_rounds import rules
from tests.scheduler.world import Worker, World
from tests.support.polling import until

from hypha.journal import Journal, JournalEntry
from hypha.messages import LedgerRound
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.rounds.events import GenerationBegan, JobRefused, Record
from hypha.scheduler.rounds.policy import Start
from hypha.scheduler.status import history as history_module
from hypha.scheduler.status.history import (
    DETAILED,
    FILE,
    History,
    HistoryFile,
    keep_history,
    read_history,
)
from hypha.scheduler.status.round_record import Fault, RoundRecord, Span

WALL = 1_700_000_000.0


def watched(**changes: object) -> tuple[World, History]:
    """A world of two workers whose journal a history listens to."""
    history = History(wall=lambda: WALL)
    journal = Journal(checked=True)
    journal.listeners.append(history.note)
    world = World(rules(**changes), journal=journal)
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05, load_s=0.2, upload_s=0.3))
    return world, history


def tiles(spans: tuple[Span, ...], length_s: float) -> bool:
    """In order, none over another, none outside the record."""
    edges = [(span.from_s, span.to_s) for span in spans]
    ends = [0.0, *(end for _, end in edges)]
    return (
        all(start <= end for start, end in edges)
        and all(start >= before - 0.002 for (start, _), before in zip(edges, ends, strict=False))
        and ends[-1] <= length_s + 0.002
    )


def test_a_round_is_what_everybody_did_in_it() -> None:
    world, history = watched()
    world.run()
    assert [record.round for record in history.records] == list(range(5))
    assert history.open_round(world.now) is None
    first, *others = history.records
    assert {span.kind for worker in first.workers for span in worker.spans} >= {"loading", "training"}
    for record in others:
        assert record.applied
        assert record.began == WALL
        ledger = world.records[record.round]
        assert (record.samples, record.loss) == (ledger.samples, ledger.loss)
        assert record.duration_s == pytest.approx(ledger.duration_s, abs=0.001)
        assert record.length_s == pytest.approx(ledger.duration_s, abs=0.001)
        # workers may have theta before it is known here that the round was opened
        kinds = [span.kind for span in record.server_spans if span.kind != "broadcast"]
        assert kinds == ["collecting", "outer-step"]
        assert tiles(record.server_spans, record.length_s)
        for worker in record.workers:
            assert worker.counted
            assert {"training", "sending"} <= {span.kind for span in worker.spans}
            assert tiles(worker.spans, record.length_s)
            trained = sum(span.to_s - span.from_s for span in worker.spans if span.kind == "training")
            assert trained == pytest.approx(worker.batches * 0.05, abs=0.2)


def test_the_open_round_is_there_as_it_goes() -> None:
    world, history = watched()
    world.run(60, until=lambda: world.machine.round == 2 and world.machine.members["a"].batches > 3)
    record = history.open_round(world.now)
    assert record is not None
    assert (record.round, record.applied) == (2, False)
    worker = next(one for one in record.workers if one.peer == "a")
    assert worker.spans[-1].kind == "training"
    assert worker.spans[-1].to_s == pytest.approx(record.length_s, abs=0.001)


def test_what_goes_wrong_is_marked() -> None:
    world, history = watched(samples=2000)
    world.run(60, until=lambda: world.machine.round == 1 and world.workers["a"].batches > 3)
    world.kill("b")
    world.run(60, until=lambda: world.machine.round == 2)
    faults = history.records[1].faults
    assert [(fault.peer, fault.what, fault.text) for fault in faults] == [("b", "lost", "its lease ended")]
    assert 0.0 < faults[0].at_s < history.records[1].length_s
    gone = next(worker for worker in history.records[1].workers if worker.peer == "b")
    assert gone.spans[-1].to_s < history.records[1].length_s
    assert [worker.peer for worker in history.records[-1].workers if worker.spans] == ["a", "b"]
    world.run(60, until=lambda: world.machine.round == 3)
    assert [worker.peer for worker in history.records[2].workers] == ["a"]


def test_faults_are_kept_without_secrets() -> None:
    history = History(wall=lambda: WALL, redact=lambda text: text.replace("hf_secret", "[secret]"))
    journal = Journal(checked=True)
    journal.listeners.append(history.note)
    world = World(rules(samples=2000), journal=journal)
    world.begin()
    for peer in "ab":
        world.add(Worker(peer, 0.05, load_s=0.2, upload_s=0.3))
    world.run(60, until=lambda: world.machine.round == 1 and world.workers["a"].batches > 3)
    world.kill("b")
    world.run(60, until=lambda: world.machine.round == 1 and "b" not in world.machine.members)
    # half a secret is not kept either, and what is no Unicode can be written
    text = "\udc80" + "x" * 191 + " hf_secret"
    history.note(
        JournalEntry(9, world.now, "rounds", JobRefused("b", "train", text), (), world.machine.summary())
    )
    open_round = history.open_round(world.now)
    assert open_round is not None
    assert open_round.faults[-1].text == "?" + "x" * 191 + " [secret"


def test_a_round_that_is_done_again_is_not_counted_twice() -> None:
    world, history = watched(checkpoint_every=100)
    world.run(60, until=lambda: world.machine.round == 2 and world.workers["a"].batches > 3)
    before = history.changes.count
    world.lose_server(0)
    changed = history.since(before)
    assert {(one.round, one.applied, one.discarded) for one in changed} == {
        (0, True, True),
        (1, True, True),
        (2, False, False),
    }
    assert changed[0].faults or any("parameter server lost" in str(one.faults) for one in changed)
    world.run(200)
    counted = [one.round for one in history.records if one.applied and not one.discarded]
    assert counted == list(range(5))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "KEPT", DETAILED + 20)
    history = History(wall=lambda: WALL)
    history.restore(
        RoundRecord("job", 0, number, WALL, server_spans=(Span("collecting", 0.0, 1.0),))
        for number in range(DETAILED + 100)
    )
    assert len(history.records) == DETAILED + 20
    assert history.records[-1].round == DETAILED + 99
    assert [bool(one.server_spans) for one in history.records] == [False] * 20 + [True] * DETAILED


def test_what_it_does_not_understand_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world, history = watched()
    world.run(60, until=lambda: world.machine.round == 1)
    journal = Journal()
    journal.listeners.append(history.note)
    for _ in range(2):
        journal.note("rounds", 100.0, None, [Record(None, None, 0)], {})  # type: ignore[arg-type]
    assert sum("A listener of the journal failed" in one.getMessage() for one in caplog.records) == 1
    assert [one.round for one in history.records] == [0]


# --- on disk ------------------------------------------------------------------------------------------------


def record(round_: int, generation: int = 0, **changes: object) -> RoundRecord:
    made = RoundRecord("job-1", generation, round_, WALL + round_, length_s=1.0, applied=True)
    return msgspec.structs.replace(made, server_spans=(Span("outer-step", 0.5, 0.9),), **changes)


def ledger(directory: Path, *entries: LedgerRound) -> None:
    opened = Ledger(directory / "job.db")
    tracker = SliceTracker([4]).to_state()
    opened.open_job(opening(), MANIFEST, tracker)
    for one in entries:
        opened.record(one, tracker, 10)
    opened.close()


def test_rounds_are_read_from_ledger_and_file_together(tmp_path: Path) -> None:
    ledger(tmp_path, entry(0), entry(1), entry(2))
    cut_short = record(1, 1, applied=False)
    HistoryFile(tmp_path / FILE).append([record(0), record(2), record(7), cut_short])
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"job_id":"job-1","generation":0,"rou')
    HistoryFile(tmp_path / FILE).append([msgspec.structs.replace(record(3), job_id="another")])
    found = read_history(tmp_path)
    # the ledger knows nothing of round 7: it was not applied
    assert [(one.generation, one.round, one.applied) for one in found] == [
        (0, 0, True),
        (0, 1, True),
        (0, 2, True),
        (1, 1, False),
    ]
    assert [bool(one.server_spans) for one in found[:3]] == [True, False, True]
    assert [one.loss for one in found[:3]] == [entry(number).loss for number in range(3)]
    # nobody noted when round 1 began: after the one before it
    assert found[1].began == WALL + 1.0


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypha.scheduler.status.history.MAX_BYTES", 4000)
    store = HistoryFile(tmp_path / FILE)
    for number in range(200):
        store.append([record(number)])
        assert (tmp_path / FILE).stat().st_size <= 4000
    lines = (tmp_path / FILE).read_bytes().splitlines()
    assert msgspec.json.decode(lines[-1], type=RoundRecord).round == 199


def test_a_full_disk_costs_the_history_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / FILE).symlink_to("/dev/full")
    store = HistoryFile(tmp_path / FILE)
    for number in range(3):
        store.append([record(number)])
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    (tmp_path / FILE).unlink()
    store.append([record(3)])
    assert "is kept in" in caplog.records[-1].getMessage()
    assert len((tmp_path / FILE).read_bytes().splitlines()) == 1


def test_lines_that_are_no_text_are_skipped(tmp_path: Path) -> None:
    ledger(tmp_path, entry(0), entry(1))
    store = HistoryFile(tmp_path / FILE)
    store.append([record(0)])
    good = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(good.replace(b"job-1", b"job-\xff") + good)
    assert [bool(one.server_spans) for one in read_history(tmp_path)] == [True, False]


def test_a_record_that_cannot_be_written_costs_itself_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = HistoryFile(tmp_path / FILE)
    store.append([record(0, server="\udc80")])
    store.append([record(1)])
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert len((tmp_path / FILE).read_bytes().splitlines()) == 1


async def test_nothing_of_keeping_it_ends_the_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = History(wall=lambda: WALL)
    # what is no record stands for whatever is unforeseen
    history._put(record(0))
    history._records[0, 0] = object()  # type: ignore[assignment]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_history, history, tmp_path)
    assert sum("is not kept any more" in one.getMessage() for one in caplog.records) == 1


async def test_the_next_scheduler_shows_what_the_one_before_has_kept(tmp_path: Path) -> None:
    world, first = watched()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_history, first, tmp_path)
        world.run(60, until=lambda: world.machine.round == 3)
        await until(
            lambda: (tmp_path / FILE).exists() and len((tmp_path / FILE).read_bytes().splitlines()) == 3
        )
        nursery.cancel_scope.cancel()
    kept = [
        msgspec.json.decode(line, type=RoundRecord) for line in (tmp_path / FILE).read_bytes().splitlines()
    ]
    assert [one.round for one in kept] == [0, 1, 2]

    # the ledger is that of job-1, and its generations go on
    told = (Fault(0.5, "b", "lost", "hf_secret"),)
    lines = [msgspec.structs.replace(one, job_id="job-1", faults=told) for one in kept]
    (tmp_path / FILE).unlink()
    HistoryFile(tmp_path / FILE).append(lines)
    ledger(tmp_path, entry(0), entry(1))
    second = History(wall=lambda: WALL + 100, redact=lambda text: text.replace("hf_secret", "[secret]"))
    journal = Journal()
    journal.listeners.append(second.note)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_history, second, tmp_path)
        later = World(rules(), journal=journal)
        first_generation = journal.entries[0].event
        assert isinstance(first_generation, GenerationBegan)
        began = msgspec.structs.replace(first_generation, start=Start("job-1", 1, 2))
        second.note(JournalEntry(1, 0.0, "rounds", began, (), later.machine.summary()))
        await until(lambda: second.replaced == 1)
        nursery.cancel_scope.cancel()
    assert [one.round for one in second.records] == [0, 1]
    assert all(worker.spans for one in second.records for worker in one.workers if worker.peer in "ab")
    assert [one.loss for one in second.records] == [entry(0).loss, entry(1).loss]
    # what the one before did not know as a secret
    assert [one.faults[0].text for one in second.records] == ["[secret]"] * 2

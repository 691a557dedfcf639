"""The journal of the machines: one run gives one text, and the text gives the same decisions again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.scheduler.test_rounds import rules
from tests.scheduler.world import Worker, World
from tests.worker.test_arbiter import arbiter, hear, request

from hypha.cli.job.rerun import rerun
from hypha.errors import HyphaError, JobFailed
from hypha.journal import KEPT_BYTES, Journal, JournalEntry, encode_line, write_entries
from hypha.messages import ExecutorDescriptor, PeerRef, Progress, Resources, WorkerOffer
from hypha.rules.leases import Release, Tick
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.leasing.events import Gained, LeaseFailed, Offered, Search, Want
from hypha.scheduler.leasing.renewal import ConnectionLost, Renewal, RenewalFailed, Renewed
from hypha.scheduler.rounds.events import Fail, Publish, Record
from hypha.scheduler.rounds.events import TimePassed as RoundTick
from hypha.worker.leasing.events import OfferFailed, RenewAsked


def eventful(journal: Journal, seed: int = 5) -> World:
    """A job through crashes, another scheduler and another parameter server."""
    world = World(rules(rounds=4, samples=600), seed=seed, repeat=0.3, journal=journal)
    world.begin()
    for number in range(3):
        world.add(Worker(f"w{number}", 0.05 * (number + 1)))
    world.at(2.0, lambda: world.crash("w1"))
    world.at(6.0, lambda: world.take_over(1.0))
    world.at(15.0, lambda: world.lose_server(0))
    world.at(20.0, lambda: world.kill("w2"))
    world.run(5000)
    assert isinstance(world.ended, Publish)
    return world


def test_a_run_has_one_text_whatever_its_hashes_are() -> None:
    """In processes whose strings hash otherwise, too."""
    program = (
        "from tests.test_journal import eventful\n"
        "from hypha.journal import Journal\n"
        "journal = Journal(kept=10**6)\n"
        "eventful(journal)\n"
        "import hashlib, sys\n"
        "sys.stdout.write(hashlib.sha256(b''.join(e.line() for e in journal.entries)).hexdigest())\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert len(texts.pop()) == 64


def test_what_peers_have_sent_does_not_fill_the_memory() -> None:
    """A worker's offer, or what it reports, is an event: each of its messages stays here for a while."""
    journal = Journal(kept=100)
    for number in range(150):
        journal.note("m", 0.0, Fail(f"{number}"), (), {})
    assert [entry.number for entry in journal.entries] == list(range(50, 150))
    for _ in range(100):
        journal.note("m", 0.0, Fail("x" * (1 << 20)), (), {})
    assert 1 < len(journal.entries) < 1 + KEPT_BYTES // (1 << 20)
    journal.note("m", 0.0, Fail("the last"), (), {})
    assert journal.entries[-1].event == Fail("the last")


def test_the_round_machine_decides_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(kept=10, file=path, checked=True)
    world = eventful(journal)
    journal.close()
    result = rerun(path)
    assert result.difference is None
    assert result.machines == world.machine.start.generation + 1 == 3
    assert result.entries == len(path.read_bytes().splitlines())
    assert not result.without_beginning
    assert len(journal.entries) == 10


def test_an_answer_that_is_another_one_now_is_found(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(file=path)
    eventful(journal)
    journal.close()
    lines = path.read_bytes().splitlines()
    number = next(
        number for number, line in enumerate(lines) if b'"Plan"' in line or b'"type":"plan"' in line
    )
    entry = json.loads(lines[number])
    for action in entry["actions"]:
        if action.get("directive", {}).get("type") == "plan":
            action["directive"]["batches"] += 1
    lines[number] = encode_line(entry)
    path.write_bytes(b"\n".join(lines))
    found = rerun(path).difference
    assert found is not None
    assert (found.number, found.machine, found.what) == (number, "rounds", "actions")
    assert found.then != found.now


def test_a_journal_that_does_not_begin_with_the_machine_is_said_to(tmp_path: Path) -> None:
    journal = Journal(kept=20)
    eventful(journal)
    path = tmp_path / "journal.jsonl"
    write_entries(path, {"state": "failed"}, tuple(journal.entries))
    result = rerun(path)
    assert (result.entries, result.without_beginning) == (0, 20)


def test_what_a_killed_process_wrote_in_part_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(file=path)
    eventful(journal)
    journal.close()
    whole = len(path.read_bytes().splitlines())
    path.write_bytes(path.read_bytes()[:-30])
    journal = Journal(file=path)
    eventful(journal)
    journal.close()
    result = rerun(path)
    assert result.difference is None
    assert result.entries == 2 * whole - 1


def test_no_journal_is_told_from_a_difference(tmp_path: Path) -> None:
    with pytest.raises(HyphaError, match="cannot be read"):
        rerun(tmp_path / "nothing")
    path = tmp_path / "other.jsonl"
    path.write_text('{"machine": "rounds", "event": {"type": "LifeBegan"}, "at_s": 0}\n')
    with pytest.raises(HyphaError, match="no journal of this version"):
        rerun(path)


# --- the other machines -----------------------------------------------------------------------------------


def test_an_arbiter_and_its_leases_decide_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(file=path, checked=True)
    worker = arbiter(journal=journal, strategy="whole")
    hear(worker, 0.0, request("A", bid=1.0), request("B", bid=2.0))
    worker.handle(RenewAsked("lease-1", "B"), 1.0)
    hear(worker, 2.0, request("A", "r2"))
    worker.handle(Release("lease-1", "B"), 3.0)
    hear(worker, 4.0, request("A", "r3"))
    worker.handle(OfferFailed("lease-2", "gone"), 4.5)
    worker.handle(Tick(), 100.0)
    journal.close()
    result = rerun(path)
    assert result.difference is None
    assert result.machines == 1
    assert result.entries > 10


def test_an_allocator_and_a_renewal_decide_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(file=path, checked=True)
    ask = Search("r", ExecutorDescriptor(kind="train", name="x"), Resources(cpu=1), 1.0, 1.0)
    allocator = Allocator([ask], journal=journal)
    allocator.handle(Want("train", 1), 0.0)
    for name in ("one", "two"):
        offer = WorkerOffer(
            lease_id=name,
            request_id="r",
            worker=PeerRef(peer=name),
            resources=Resources(cpu=1),
            price=1.0,
            expires_in_s=5.0,
        )
        allocator.handle(Offered(name, offer), 0.1)
    allocator.handle(Tick(), 0.5)
    allocator.handle(Gained("one"), 0.6)
    allocator.handle(LeaseFailed("one"), 9.0)
    renewal = Renewal(5.0, 0.5, Random(3), "one", journal)
    renewal.handle(Tick(), 0.5)
    renewal.handle(Renewed(30.0), 0.6)
    renewal.handle(ConnectionLost(), 5.0)
    renewal.handle(RenewalFailed("no luck", unreachable=True), 5.1)
    renewal.handle(Tick(), renewal.next_wake)
    renewal.handle(Renewed(float("nan")), 6.0)
    renewal.handle(Tick(), 60.0)
    journal.close()
    result = rerun(path)
    assert result.difference is None
    assert result.machines == 2
    assert result.entries == len(path.read_bytes().splitlines())


def without(value: Any, field: str) -> Any:
    """As an earlier version noted it, which did not have this field."""
    if isinstance(value, dict):
        return {key: without(one, field) for key, one in value.items() if key != field}
    return [without(one, field) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("noted", "differs"), [(("bf16",), True), ((), False)])
def test_a_field_that_an_earlier_version_did_not_note_is_no_difference_where_it_says_nothing(
    tmp_path: Path, noted: tuple[str, ...], differs: bool
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(file=path)
    ask = Search("r", ExecutorDescriptor(kind="train", name="x"), Resources(cpu=1), 1.0, 1.0, needs=noted)
    Allocator([ask], journal=journal).handle(Want("train", 1), 0.0)
    journal.close()
    began, advertised = map(json.loads, path.read_bytes().splitlines())
    assert advertised["actions"][0]["ask"]["needs"] == list(noted)
    # the allocator is made from what is noted of it, so only its actions are compared
    path.write_bytes(encode_line(began) + b"\n" + encode_line(without(advertised, "needs")))
    assert (rerun(path).difference is not None) == differs


# --- writing ----------------------------------------------------------------------------------------------


def test_an_entry_is_written_with_sets_in_order_errors_by_name_and_no_number_lost() -> None:
    entry = JournalEntry(0, 0.1, "m", Fail(JobFailed("over")), (), {"some": {"b", "a"}, "none": float("inf")})
    line = json.loads(entry.line())
    assert line["event"] == {"type": "Fail", "error": {"error": "JobFailed", "text": "over"}}
    assert line["state"] == {"some": ["a", "b"], "none": float("inf")}
    nothing = Progress(round=0, batches=1, samples=1, busy_s=0.1, loss=float("nan"))
    assert b'"loss":NaN' in encode_line(nothing)


@dataclass
class _Unknown:
    value: object


def test_what_has_no_text_is_a_defect() -> None:
    with pytest.raises(NotImplementedError, match="object has no place"):
        encode_line(_Unknown(object()))


def test_a_disk_that_is_full_ends_the_file_and_not_the_job(caplog: pytest.LogCaptureFixture) -> None:
    journal, heard = Journal(file=Path("/dev/full")), list[int]()
    journal.listeners.append(lambda entry: heard.append(entry.number))
    for _ in range(3):
        journal.note("m", 0.0, Tick(), (), "")
    journal.close()
    assert heard == [0, 1, 2]
    assert len([record for record in caplog.records if "cannot be written any more" in record.message]) == 1


def test_what_is_left_of_a_failed_job_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    good = JournalEntry(0, 0.0, "m", Tick(), (), "")
    write_entries(path, "first", (good,))
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):
        write_entries(path, "second", (good, JournalEntry(1, 0.0, "m", object(), (), "")))
    assert path.read_bytes() == before


# --- invariants -------------------------------------------------------------------------------------------


def test_a_slice_in_two_places_is_noticed() -> None:
    world = World(rules())
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(60, until=lambda: world.machine.round == 1)
    epochs: dict[int, Any] = world.machine.tracker._epochs  # type: ignore[assignment]
    epoch = next(epoch for epoch in epochs.values() if epoch.assigned)
    epoch.available.add(min(epoch.assigned))
    world.machine.tracker.give_back("a", [])
    with pytest.raises(AssertionError, match="epoch"):
        world.feed(RoundTick())


def test_a_round_that_goes_back_is_noticed() -> None:
    world = World(rules())
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(60, until=lambda: world.machine.round == 1)
    world.machine.round = -1
    with pytest.raises(AssertionError, match="round -1"):
        world.run(60)


def test_entries_name_the_round_and_its_phase_for_whoever_listens() -> None:
    seen: list[tuple[str, int]] = []
    journal = Journal()

    def listen(entry: JournalEntry) -> None:
        assert isinstance(entry.state, dict)
        place = (entry.state["phase"], entry.state["round"])
        if not seen or seen[-1] != place:
            seen.append(place)

    journal.listeners.append(listen)
    world = World(rules(rounds=2), journal=journal)
    world.begin()
    world.add(Worker("a", 0.05))
    world.run(60)
    assert ("closing", 0) in seen
    assert seen.index(("training", 0)) < seen.index(("closing", 0)) < seen.index(("training", 1))
    recorded = [
        action.entry.round
        for entry in journal.entries
        for action in entry.actions
        if isinstance(action, Record)
    ]
    assert recorded == [0, 1]


def test_a_listener_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def broken(entry: JournalEntry) -> None:
        raise RuntimeError("no more threads")

    journal = Journal()
    journal.listeners += [broken, lambda entry: seen.append(entry.number)]
    for _ in range(3):
        journal.note("machine", 0.0, "event", (), {})
    assert seen == [0, 1, 2]
    assert caplog.text.count("A listener of the journal failed") == 1
    # whoever put it there takes it away again at the end
    journal.leave(broken)
    # where machines are checked, listeners check them, too
    checked = Journal(checked=True)
    checked.listeners.append(broken)
    with pytest.raises(RuntimeError):
        checked.note("machine", 0.0, "event", (), {})

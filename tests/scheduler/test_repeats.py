"""Whatever the network repeats or delivers out of order, a job's books come out the same.

A job is run once; all that was said in it is then said again to a fresh machine, twice and in another order,
within what the network permits. An executor's events come in their order, as the worker sends the next one
when the last one was acknowledged; what different senders say, and what goes over the report stream, does
not. What the scheduler tells executors is a consequence of what it heard before, and a cause of what it hears
after. Repetitions may come at any time later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import strategies as st
from tests.scheduler.world import SCHEDULER, Worker, World
from tests.support.examples import few_and_many

from hypha.journal import Journal
from hypha.messages import LedgerRound
from hypha.scheduler.data.slices import SliceTracker, TrackerState
from hypha.scheduler.handlers import Seen
from hypha.scheduler.rounds.events import (
    Action,
    AnswerSlice,
    Input,
    Publish,
    Record,
    Reported,
    Send,
    SliceAsked,
    Told,
)
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import Rules, Start

SAMPLES = (40,) * 10
RULES = Rules(rounds=4, samples=600, inner_steps=9, min_workers=1)


@dataclass(frozen=True)
class Said:
    """An event as it reached the scheduler; ``part`` counts how often steered before it."""

    what: Input
    at: float
    part: int


class Recorder(RoundMachine):
    """A round machine that keeps what it was told and asked."""

    def __init__(self) -> None:
        super().__init__(RULES, Start("job"), SliceTracker(SAMPLES), SCHEDULER, journal=Journal(checked=True))
        self.said: list[Said] = []
        self.part = 0

    def handle(self, event: Input, now: float) -> list[Action]:
        self.said.append(Said(event, now, self.part))
        actions = super().handle(event, now)
        self.part += any(isinstance(one, Send) for one in actions)
        return actions


@dataclass(frozen=True)
class Books:
    """What counts in the end: the ledger without its durations, the slices, the inner steps."""

    ledger: tuple[LedgerRound, ...]
    tracker: TrackerState
    steps: int
    round: int


def contributions_of(machine: RoundMachine, records: dict[int, LedgerRound]) -> Books:
    ledger = tuple(msgspec.structs.replace(records[number], duration_s=0.0) for number in sorted(records))
    return Books(ledger, machine.tracker.to_state().unassigned(), machine.steps, machine.round)


def recorded(speeds: list[float], seed: int) -> tuple[list[Said], Books]:
    """All that was said in one undisturbed job, and its books."""
    world = World(RULES, SAMPLES, seed=seed)
    world.machine = machine = Recorder()
    world.begin()
    for number, speed in enumerate(speeds):
        world.add(Worker(f"w{number}", speed))
    world.run(5000)
    assert isinstance(world.ended, Publish)
    return machine.said, contributions_of(machine, world.records)


def disturbed(said: list[Said], shifts: list[int], repeats: list[int]) -> list[tuple[Said, bool]]:
    """Another order, with repetitions (True)."""
    keyed: list[tuple[tuple[int, float, int], Said, bool]] = []
    last: dict[tuple[int, str, str], float] = defaultdict(float)
    for number, one in enumerate(said):
        key = float(number)
        if isinstance(one.what, Told | Reported):
            key += shifts[number % len(shifts)]
        if isinstance(one.what, Told):
            process = (one.part, one.what.sender, one.what.kind)
            key = last[process] = max(key, last[process])
        keyed.append(((one.part, key, number), one, False))
        if isinstance(one.what, Told | Reported | SliceAsked) and (later := repeats[number % len(repeats)]):
            # a repetition may be as late as it likes
            at = min(number + later, len(said) - 1)
            keyed.append(((max(one.part, said[at].part), key + later, number), one, True))
    return [(one, again) for _, one, again in sorted(keyed, key=lambda entry: entry[0])]


def replayed(order: list[tuple[Said, bool]], deduplicated: bool) -> tuple[Books, Counter[str]]:
    """What a fresh machine makes of it; ``deduplicated``: repeated events are dropped before, at the desk."""
    machine = RoundMachine(
        RULES, Start("job"), SliceTracker(SAMPLES), SCHEDULER, journal=Journal(checked=True)
    )
    records: dict[int, LedgerRound] = {}
    answers: dict[tuple[str, int], object] = {}
    seen, numbers = Seen(), dict[int, int]()
    now = 0.0
    for one, _ in order:
        now = max(now, one.at)
        match one.what:
            case Told() as told if deduplicated:
                seq = numbers.setdefault(id(told), len(numbers))
                if not seen.first_time((told.sender, told.kind, told.incarnation), seq):
                    continue
            case _:
                pass
        for action in machine.handle(one.what, now):
            if isinstance(action, Record):
                records[action.entry.round] = action.entry
            if isinstance(action, AnswerSlice) and action.slice is not None:
                assert isinstance(one.what, SliceAsked)
                question = (one.what.caller, one.what.request.seq)
                assert answers.setdefault(question, action.slice) == action.slice
    return contributions_of(machine, records), machine.counts


@few_and_many(
    pytest.mark.simulated,
    speeds=st.lists(st.floats(0.02, 0.3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    shifts=st.lists(st.integers(0, 12), min_size=5, max_size=60),
    repeats=st.lists(st.one_of(st.just(0), st.integers(1, 400)), min_size=5, max_size=60),
    deduplicated=st.booleans(),
)
def test_repeated_and_reordered_words_change_no_book(
    speeds: list[float], seed: int, shifts: list[int], repeats: list[int], deduplicated: bool
) -> None:
    said, updates = recorded(speeds, seed)
    used = Counter(
        (span.epoch, span.slice, row)
        for entry in updates.ledger
        for part in entry.contributors
        for span in part.ranges
        for row in range(span.start, span.stop)
    )
    assert set(used.values()) == {1}, "a sample is used once an epoch"
    assert [entry.round for entry in updates.ledger] == list(range(RULES.rounds))
    assert replayed([(one, False) for one in said], False)[0] == updates, "the same words, the same books"
    again, _ = replayed(disturbed(said, shifts, repeats), deduplicated)
    assert again == updates


def test_words_of_another_generation_change_nothing_and_are_counted() -> None:
    """A zombie repeats all of its life to the scheduler of the next one."""
    said, updates = recorded([0.1, 0.2], 1)
    life: list[tuple[Said, bool]] = []
    ghosts = 0
    for one in said:
        if isinstance(one.what, Told | Reported):
            stale = msgspec.structs.replace(
                one.what, stamp=msgspec.structs.replace(one.what.stamp, generation=3)
            )
            life.append((Said(stale, one.at, one.part), False))
            ghosts += 1
        elif isinstance(one.what, SliceAsked):
            question = one.what.request
            stamp = msgspec.structs.replace(question.stamp, generation=3)
            asked = SliceAsked(one.what.caller, msgspec.structs.replace(question, stamp=stamp))
            life.append((Said(asked, one.at, 0), False))
            ghosts += 1
        life.append((one, False))
    again, counts = replayed(life, False)
    assert again == updates
    assert counts["stale generation"] + counts["uninvited"] >= ghosts

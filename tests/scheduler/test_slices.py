"""Slices: each once an epoch, whoever dies, whatever is repeated."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hypha.errors import DataError
from hypha.scheduler.data.slices import Assignment, SliceTracker, TrackerState


@pytest.mark.parametrize("samples", [(), (3, 0), (-1,)])
def test_a_dataset_without_rows_is_refused(samples: tuple[int, ...]) -> None:
    with pytest.raises(DataError):
        SliceTracker(samples)


def test_the_same_question_gets_the_same_answer() -> None:
    tracker = SliceTracker((5, 6, 7))
    first = tracker.next("a", "i", 1)
    assert tracker.next("a", "i", 1) == first
    assert tracker.next("a", "i", 2) != first
    assert first == Assignment(0, 0, 5)


def test_cached_slices_come_first_and_those_of_others_last() -> None:
    tracker = SliceTracker((1,) * 6)
    assert tracker.next("a", "i", 1, cached=(4, 2)).index == 4
    assert tracker.next("b", "j", 1, cached=(0, 1)).index == 0
    # 1 is cached by b and 2 by a: a gets 2 by affinity, c neither
    assert tracker.next("c", "k", 1).index == 3
    assert tracker.next("a", "i", 2, cached=(4, 2)).index == 2
    # only cached ones and 5 are left
    assert tracker.next("c", "k", 2).index == 5
    assert tracker.next("c", "k", 3).index == 1


def test_an_outstanding_slice_does_not_block_the_next_epoch() -> None:
    tracker = SliceTracker((1, 1))
    held = tracker.next("slow", "i", 1)
    fast = [tracker.next("fast", "j", seq) for seq in range(4)]
    assert [part.epoch for part in fast] == [0, 1, 1, 2]
    assert held.epoch == 0
    assert tracker.epoch == 0
    tracker.finish("slow", [(0, held.index)])
    tracker.finish("fast", [(0, fast[0].index)])
    assert tracker.epoch == 1


def test_a_lost_slice_is_handed_out_again_before_newer_epochs() -> None:
    tracker = SliceTracker((1, 1))
    held = tracker.next("dies", "i", 1)
    tracker.next("lives", "j", 1)
    assert tracker.next("lives", "j", 2).epoch == 1
    assert tracker.lose("dies") == [(0, held.index)]
    assert tracker.next("lives", "j", 3) == held


def test_a_new_incarnation_loses_what_the_old_one_held() -> None:
    tracker = SliceTracker((1, 1, 1))
    first = tracker.next("a", "one", 1)
    assert tracker.next("a", "two", 1) == first
    assert tracker.held("a") == [(0, 0)]


def test_only_the_holder_can_finish() -> None:
    tracker = SliceTracker((1, 1))
    tracker.next("a", "i", 1)
    assert tracker.finish("b", [(0, 0)]) == [(0, 0)]
    assert tracker.finish("a", [(0, 0), (0, 1), (7, 0)]) == [(0, 1), (7, 0)]
    assert tracker.held("a") == []


def test_what_an_open_update_contains_can_be_kept_when_its_worker_dies() -> None:
    tracker = SliceTracker((1, 1, 1))
    tracker.next("a", "i", 1)
    tracker.next("a", "i", 2)
    assert tracker.lose("a", keep=[(0, 0)]) == [(0, 1)]
    assert tracker.finish("a", [(0, 0)]) == []


def test_state_survives_the_wire() -> None:
    tracker = SliceTracker((2, 3, 4))
    for seq in range(4):
        tracker.next("a", "i", seq)
    tracker.finish("a", [(0, 1)])
    raw = msgspec.msgpack.encode(tracker.to_state())
    again = SliceTracker.from_state(msgspec.msgpack.decode(raw, type=TrackerState))
    assert again.to_state() == tracker.to_state()
    assert again.next("a", "i", 3) == tracker.next("a", "i", 3)
    assert again.next("b", "j", 0) == tracker.next("b", "j", 0)


def test_states_share_what_was_answered() -> None:
    """A journal has thousands of them, and hundreds of answers are remembered for each worker."""
    tracker = SliceTracker([10, 10, 10])
    tracker.next("a", "a1", 0)
    before = tracker.to_state()
    tracker.next("a", "a1", 1)
    assert tracker.to_state().answers[0] is before.answers[0]
    restored = SliceTracker.from_state(before)
    assert restored.to_state().answers[0] is before.answers[0]
    assert restored.next("a", "a1", 0) == tracker.next("a", "a1", 0)


def test_of_many_answers_those_are_remembered_that_may_matter() -> None:
    tracker = SliceTracker([10] * 400)
    for seq in range(400):
        got = tracker.next("a", "a1", seq)
        if seq >= 300:
            break
        tracker.finish("a", [(got.epoch, got.index)])
    assert len(tracker.to_state().answers) < 50, "they are in every state"
    assert tracker.next("a", "a1", 299) == Assignment(0, 299, 10), "of a slice it has used just now"
    # however many it holds: it can give them back
    for seq in range(301, 400):
        tracker.next("a", "a1", seq)
    assert len(tracker.held("a")) == 100
    tracker.dropped("a", "a1", 400, [])
    assert tracker.held("a") == []


def test_everybody_lost() -> None:
    tracker = SliceTracker((2, 3))
    tracker.next("a", "i", 0)
    tracker.next("a", "i", 1)
    tracker.finish("a", [(0, 0)])
    again = SliceTracker.from_state(tracker.to_state().unassigned())
    assert again.next("b", "j", 0) == Assignment(0, 1, 3)
    assert again.next("b", "j", 1).epoch == 1


class Tracked(RuleBasedStateMachine):
    """Any order of asking, finishing, dying and restarting keeps: never two holders, never used twice."""

    questions = Bundle("questions")

    def __init__(self) -> None:
        super().__init__()
        self.tracker = SliceTracker((1, 2, 3, 4))
        self.holding: dict[tuple[int, int], str] = {}
        self.used: Counter[tuple[int, int]] = Counter()
        self.seq = 0

    @rule(target=questions, worker=st.sampled_from("abc"), cached=st.lists(st.integers(0, 5), max_size=3))
    def ask(self, worker: str, cached: list[int]) -> tuple[str, int]:
        self.seq += 1
        got = self.tracker.next(worker, "i", self.seq, cached)
        pair = (got.epoch, got.index)
        assert pair not in self.holding
        assert pair not in self.used
        free = set(range(4)) - {i for e, i in [*self.holding, *self.used] if e == got.epoch}
        if free & set(cached):
            assert got.index in cached
        self.holding[pair] = worker
        return (worker, self.seq)

    @rule(question=questions)
    def ask_again(self, question: tuple[str, int]) -> None:
        worker, seq = question
        got = self.tracker.next(worker, "i", seq)
        pair = (got.epoch, got.index)
        if pair not in self.used:
            assert self.holding.setdefault(pair, worker) == worker

    @rule(worker=st.sampled_from("abc"), share=st.integers(1, 3))
    def apply(self, worker: str, share: int) -> None:
        mine = [pair for pair, holder in self.holding.items() if holder == worker][:share]
        assert self.tracker.finish(worker, mine) == []
        for pair in mine:
            del self.holding[pair]
            self.used[pair] += 1

    @rule(question=consumes(questions))
    def die(self, question: tuple[str, int]) -> None:
        worker = question[0]
        returned = self.tracker.lose(worker)
        assert set(returned) == {pair for pair, holder in self.holding.items() if holder == worker}
        for pair in returned:
            del self.holding[pair]

    @rule()
    def restart(self) -> None:
        raw = msgspec.json.encode(self.tracker.to_state())
        self.tracker = SliceTracker.from_state(msgspec.json.decode(raw, type=TrackerState))

    @invariant()
    def once(self) -> None:
        assert all(count == 1 for count in self.used.values())
        for epoch in range(self.tracker.epoch):
            assert {index for number, index in self.used if number == epoch} == {0, 1, 2, 3}
        for worker in "abc":
            mine = {pair for pair, holder in self.holding.items() if holder == worker}
            assert set(self.tracker.held(worker)) == mine


TestTracked = Tracked.TestCase
TestTracked.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

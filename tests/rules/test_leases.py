"""The lease book under numbers for a clock: nothing over-reserved, expiry alone frees, owners checked."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hypha.messages import ExecutorClass, ExecutorDescriptor, Resources
from hypha.rules.leases import (
    Bind,
    BookAction,
    BookEvent,
    Denied,
    Drained,
    Freed,
    Granted,
    Hold,
    Lease,
    LeaseBook,
    LeaseEnded,
    Release,
    Tick,
)
from hypha.rules.resources import TOLERANCE, fits

TOTAL = Resources(cpu=4, memory=8, gpu=1, storage=10)


class CheckedBook(LeaseBook):
    """Asserts after all that happens what must hold."""

    def reserve(self, lease: Lease, life_s: float, now: float) -> list[BookAction]:
        return self._checked(super().reserve(lease, life_s, now), now)

    def renew(self, lease_id: str, caller: str, life_s: float, now: float) -> list[BookAction]:
        return self._checked(super().renew(lease_id, caller, life_s, now), now)

    def revoke(self, lease_id: str, now: float) -> list[BookAction]:
        return self._checked(super().revoke(lease_id, now), now)

    def handle(self, event: BookEvent, now: float) -> list[BookAction]:
        return self._checked(super().handle(event, now), now)

    def _checked(self, actions: list[BookAction], now: float) -> list[BookAction]:
        self.validate(now)
        return actions


def lease(
    lease_id: str = "l1",
    scheduler: str = "S",
    kind: ExecutorClass = "train",
    resources: Resources = Resources(cpu=2, memory=4),  # noqa: B008  frozen
) -> Lease:
    return Lease(
        lease_id=lease_id,
        request_id=f"request of {lease_id}",
        scheduler=scheduler,
        executor=ExecutorDescriptor(kind=kind, name=kind),
        resources=resources,
        price=1.0,
        expires_at=0.0,
    )


def codes(actions: list[BookAction]) -> list[str]:
    return [action.code for action in actions if isinstance(action, Denied)]


def held(book: LeaseBook, lease_id: str = "l1") -> Lease:
    found = book.get(lease_id)
    assert found is not None
    return found


def accepted(**changes: object) -> LeaseBook:
    book = CheckedBook(TOTAL)
    book.reserve(lease(**changes), 5.0, 0.0)  # type: ignore[arg-type]
    book.renew("l1", "S", 30.0, 1.0)
    return book


def test_a_temporary_lease_expires_by_itself() -> None:
    book = CheckedBook(TOTAL)
    [granted] = book.reserve(lease(), 5.0, 100.0)
    assert isinstance(granted, Granted)
    assert granted.lease.expires_at == 105.0
    assert not granted.lease.accepted
    assert book.free == Resources(cpu=2, memory=4, gpu=1, storage=10)
    assert book.next_wake == 105.0
    assert book.handle(Tick(), 104.9) == []
    assert book.handle(Tick(), 105.0) == [LeaseEnded(granted.lease, "expired")]
    assert book.free == TOTAL
    assert book.next_wake is None


def test_the_first_renewal_accepts_and_renewals_carry_it_on() -> None:
    book = accepted()
    assert held(book).accepted
    assert held(book).expires_at == 31.0
    book.renew("l1", "S", 30.0, 23.0)
    assert held(book).expires_at == 53.0
    [ended] = book.handle(Tick(), 53.0)
    assert isinstance(ended, LeaseEnded)
    assert ended.reason == "expired"


def test_a_renewal_never_shortens_a_life() -> None:
    book = accepted()
    book.renew("l1", "S", 5.0, 2.0)
    assert held(book).expires_at == 31.0


def test_a_renewal_at_or_after_expiry_is_refused_even_when_nobody_looked_before() -> None:
    book = accepted()
    actions = book.renew("l1", "S", 30.0, 31.0)
    assert [type(action) for action in actions] == [LeaseEnded, Denied]
    assert codes(actions) == ["lease"]
    assert len(book) == 0


@pytest.mark.parametrize(
    "ask",
    [
        lambda book: book.renew("l1", "X", 30.0, 2.0),
        lambda book: book.handle(Release("l1", "X"), 2.0),
        lambda book: book.handle(Bind("l1", "X", "train", "job"), 2.0),
    ],
)
def test_a_foreign_lease_answers_like_an_unknown_one(ask: Callable[[LeaseBook], list[BookAction]]) -> None:
    book = accepted()
    before = held(book)
    [foreign] = ask(book)
    [unknown] = ask(CheckedBook(TOTAL))
    assert foreign == unknown
    assert codes([foreign]) == ["lease"]
    assert held(book) == before


def test_a_lease_is_for_one_job_of_one_executor_class() -> None:
    book = accepted()
    assert codes(book.handle(Bind("l1", "S", "aggregate", "job"), 2.0)) == ["lease"]
    assert isinstance(book.handle(Bind("l1", "S", "train"), 2.0)[0], Granted)
    assert held(book).job_id is None
    assert isinstance(book.handle(Bind("l1", "S", "train", "job"), 2.0)[0], Granted)
    assert isinstance(book.handle(Bind("l1", "S", "train", "job"), 2.0)[0], Granted)
    assert codes(book.handle(Bind("l1", "S", "train", "other"), 2.0)) == ["lease"]
    assert held(book).job_id == "job"


def test_nothing_is_dispatched_under_a_lease_that_was_not_accepted() -> None:
    book = CheckedBook(TOTAL)
    book.reserve(lease(), 5.0, 0.0)
    assert codes(book.handle(Bind("l1", "S", "train", "job"), 1.0)) == ["lease"]


def test_training_and_parameter_server_live_side_by_side_and_end_apart() -> None:
    book = accepted()
    book.reserve(lease("l2", kind="aggregate"), 5.0, 1.0)
    book.renew("l2", "S", 30.0, 2.0)
    assert book.free == Resources(cpu=0, memory=0, gpu=1, storage=10)
    [ended] = book.handle(Release("l1", "S"), 3.0)
    assert isinstance(ended, LeaseEnded)
    assert (ended.lease.lease_id, ended.reason) == ("l1", "released")
    assert held(book, "l2").kind == "aggregate"


def test_more_than_is_free_is_denied_and_changes_nothing() -> None:
    book = accepted()
    used = book.used
    for resources in (Resources(cpu=2.1), Resources(gpu=2), Resources(memory=math.nan), Resources(cpu=-1)):
        [denied] = book.reserve(lease("l2", resources=resources), 5.0, 2.0)
        assert isinstance(denied, Denied)
    assert book.used == used


def test_an_id_is_not_given_twice() -> None:
    book = accepted()
    assert codes(book.reserve(lease(), 5.0, 2.0)) == ["duplicate"]


def test_an_undelivered_offer_frees_at_once_but_an_accepted_lease_stays() -> None:
    book = CheckedBook(TOTAL)
    book.reserve(lease(), 5.0, 0.0)
    assert isinstance(book.revoke("l1", 1.0)[0], LeaseEnded)
    assert book.free == TOTAL
    book = accepted()
    assert book.revoke("l1", 2.0) == []
    assert held(book).accepted


def test_a_held_lease_keeps_its_resources_until_its_executor_is_gone() -> None:
    book = accepted()
    book.handle(Hold("l1", 10.0), 2.0)
    [ended] = book.handle(Tick(), 31.0)
    assert isinstance(ended, LeaseEnded)
    assert book.get("l1") is None
    assert book.free.cpu == 2
    assert codes(book.renew("l1", "S", 30.0, 32.0)) == ["lease"]
    assert book.handle(Drained("l1"), 33.0) == [Freed(ended.lease)]
    assert book.free == TOTAL
    assert book.handle(Drained("l1"), 34.0) == []


def test_a_hold_ends_by_itself_counted_from_the_expiry() -> None:
    book = accepted()
    book.handle(Hold("l1", 10.0), 2.0)
    book.handle(Tick(), 35.0)
    assert book.next_wake == 41.0
    [freed] = book.handle(Tick(), 41.0)
    assert isinstance(freed, Freed)
    assert book.free == TOTAL


def test_an_executor_that_ended_before_its_lease_leaves_no_hold() -> None:
    book = accepted()
    book.handle(Hold("l1", 10.0), 2.0)
    book.handle(Drained("l1"), 3.0)
    book.handle(Release("l1", "S"), 4.0)
    assert book.free == TOTAL


def test_a_lease_is_found_by_request_only_while_it_lives() -> None:
    book = accepted()
    assert book.live_for("S", "request of l1") == held(book)
    assert book.live_for("X", "request of l1") is None
    book.handle(Release("l1", "S"), 2.0)
    assert book.live_for("S", "request of l1") is None


def test_many_that_expire_together_end_in_one_call_the_oldest_first() -> None:
    book = CheckedBook(TOTAL)
    for index, life_s in enumerate((3.0, 1.0, 2.0)):
        book.reserve(lease(f"l{index}", resources=Resources(cpu=1)), life_s, 0.0)
    ended = [action.lease.lease_id for action in book.handle(Tick(), 9.0) if isinstance(action, LeaseEnded)]
    assert ended == ["l1", "l2", "l0"]


def test_durations_that_are_not_finite_are_refused() -> None:
    book = CheckedBook(TOTAL)
    with pytest.raises(ValueError, match="life_s"):
        book.reserve(lease(), math.inf, 0.0)


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens in whatever order, the book is held against a list of what was granted."""

    ids = st.sampled_from([f"l{index}" for index in range(6)])
    callers = st.sampled_from(["S", "T"])
    lives = st.floats(min_value=0.1, max_value=20)
    sizes = st.sampled_from([0.0, 0.1, 0.3, 1.0, 1.5, 4.0, 9.0])

    def __init__(self) -> None:
        super().__init__()
        self.book = CheckedBook(TOTAL)
        self.now = 0.0
        self.granted = 0
        self.ended = 0

    def do(self, event: BookEvent) -> list[BookAction]:
        return self.done(self.book.handle(event, self.now))

    def done(self, actions: list[BookAction]) -> list[BookAction]:
        self.ended += sum(isinstance(action, LeaseEnded) for action in actions)
        return actions

    @rule(lease_id=ids, scheduler=callers, cpu=sizes, memory=sizes, life_s=lives)
    def reserve(self, lease_id: str, scheduler: str, cpu: float, memory: float, life_s: float) -> None:
        wanted = Resources(cpu=cpu, memory=memory)
        self.do(Tick())
        possible = fits(wanted, self.book.free) and lease_id not in {
            known.lease_id for known in (*self.book, *self.book.draining)
        }
        actions = self.done(self.book.reserve(lease(lease_id, scheduler, resources=wanted), life_s, self.now))
        assert possible == isinstance(actions[-1], Granted)
        self.granted += possible

    @rule(lease_id=ids, caller=callers, life_s=lives)
    def renew(self, lease_id: str, caller: str, life_s: float) -> None:
        actions = self.done(self.book.renew(lease_id, caller, life_s, self.now))
        known = self.book.get(lease_id)
        if known is not None and known.scheduler == caller:
            assert actions[-1] == Granted(known)
            assert known.accepted
            assert known.expires_at >= self.now + life_s
        else:
            assert isinstance(actions[-1], Denied)

    @rule(lease_id=ids, caller=callers)
    def release(self, lease_id: str, caller: str) -> None:
        before = self.book.get(lease_id)
        self.do(Release(lease_id, caller))
        if before is not None and before.scheduler != caller and before.expires_at > self.now:
            assert self.book.get(lease_id) == before

    @rule(lease_id=ids, hold_s=lives)
    def hold(self, lease_id: str, hold_s: float) -> None:
        self.do(Hold(lease_id, hold_s))

    @rule(lease_id=ids)
    def drained(self, lease_id: str) -> None:
        self.do(Drained(lease_id))
        assert lease_id not in {known.lease_id for known in self.book.draining}

    @rule(seconds=st.floats(min_value=0, max_value=15))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.do(Tick())

    @rule()
    def wait_for_everything(self) -> None:
        """Expiry alone frees: without another message all comes back."""
        self.now += 100.0
        self.do(Tick())
        assert self.book.free == TOTAL
        assert len(self.book) == 0

    @invariant()
    def never_over_reserved_and_nothing_lost(self) -> None:
        used = self.book.used
        assert fits(used, TOTAL)
        for name in ("cpu", "memory", "gpu", "storage"):
            there = getattr(self.book.free, name) + getattr(used, name)
            assert math.isclose(there, getattr(TOTAL, name), abs_tol=10 * TOLERANCE)

    @invariant()
    def everything_granted_lives_or_has_ended_once(self) -> None:
        assert self.granted == self.ended + len(self.book)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

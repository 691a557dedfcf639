"""The lessee's side of a lease under numbers for a clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.journal import Journal
from hypha.rules.leases import Tick
from hypha.scheduler.leasing.renewal import (
    Attempt,
    CertificateRevoked,
    ConnectionLost,
    Lapsed,
    Recovered,
    Renewal,
    RenewalFailed,
    RenewalRefused,
    Renewed,
    Suspected,
)


def attempted(actions: list[object]) -> bool:
    return any(isinstance(action, Attempt) for action in actions)


def held(random: Random | None = None) -> Renewal:
    """Accepted at 0 for 30 s."""
    renewal = Renewal(5.0, 0.0, random or Random(1), journal=Journal(checked=True))
    assert attempted(renewal.handle(Tick(), 0.0))
    assert renewal.handle(Renewed(30.0), 0.1) == []
    return renewal


def test_the_acceptance_is_due_at_once_and_leaves_time_for_another() -> None:
    assert Renewal(5.0, 100.0, Random(1)).handle(Tick(), 100.0) == [Attempt(5 / 3)]


@given(st.integers())
def test_a_renewal_is_due_shortly_before_three_quarters_of_the_life(seed: int) -> None:
    renewal = held(Random(seed))
    due = renewal.next_wake
    assert 30 * 0.67 < due <= 30 * 0.75
    assert not attempted(renewal.handle(Tick(), due - 0.001))
    assert attempted(renewal.handle(Tick(), due))


def test_leases_gained_together_are_not_renewed_together() -> None:
    random = Random(1)
    assert len({held(random).next_wake for _ in range(20)}) == 20


def test_a_life_counts_from_when_its_renewal_was_sent() -> None:
    renewal = Renewal(5.0, 0.0, Random(1), journal=Journal(checked=True))
    renewal.handle(Tick(), 0.0)
    renewal.handle(Renewed(30.0), 2.0)
    assert renewal.expires_at == 30.0


def test_a_promise_for_ever_is_believed_for_a_while() -> None:
    renewal = Renewal(1e300, 0.0, Random(0))
    assert renewal.expires_at == Renewal.LONGEST_LEASE_S
    renewal.handle(Tick(), 0.0)
    renewal.handle(Renewed(1e300), 1.0)
    assert renewal.expires_at == Renewal.LONGEST_LEASE_S
    assert renewal.next_wake < Renewal.LONGEST_LEASE_S
    (lapsed,) = [one for one in renewal.handle(Tick(), 121.0) if isinstance(one, Lapsed)]
    assert lapsed.cause == "expired"


def test_one_attempt_at_a_time() -> None:
    renewal = held()
    due = renewal.next_wake
    assert attempted(renewal.handle(Tick(), due))
    assert renewal.handle(Tick(), due + 1) == []
    assert renewal.handle(ConnectionLost(), due + 1) == []


def test_a_revoked_lessors_promise_is_worth_nothing() -> None:
    renewal = held()
    [lapsed] = renewal.handle(CertificateRevoked(), renewal.next_wake - 1)
    assert isinstance(lapsed, Lapsed)
    assert (lapsed.cause, lapsed.refused) == ("revoked", False)
    assert renewal.handle(Renewed(30.0), renewal.expires_at - 1) == []


def test_failed_renewals_are_repeated_until_the_lease_is_over() -> None:
    renewal = held()
    now, attempts = renewal.next_wake, 0
    pauses = []
    while True:
        actions = renewal.handle(Tick(), now)
        if any(isinstance(action, Lapsed) for action in actions):
            break
        assert attempted(actions)
        attempts += 1
        assert not any(
            isinstance(action, Lapsed) for action in renewal.handle(RenewalFailed("no answer"), now)
        )
        pauses.append(renewal.next_wake - now)
        now = renewal.next_wake
    assert now == 30.0
    assert attempts >= 4
    assert max(pauses) <= Renewal.LONGEST_RETRY_S
    assert min(pauses[:-1]) >= Renewal.FIRST_RETRY_S / 2
    [lapsed] = actions
    assert lapsed == Lapsed("expired; the last renewal: no answer")
    assert renewal.handle(Renewed(30.0), now + 1) == []
    assert renewal.next_wake == math.inf


def test_one_lost_renewal_harms_nothing() -> None:
    renewal = held()
    due = renewal.next_wake
    renewal.handle(Tick(), due)
    retry = due + 2.5
    assert attempted(renewal.handle(RenewalFailed("timed out"), retry))
    assert renewal.handle(Renewed(30.0), retry + 0.1) == []
    assert renewal.expires_at == retry + 30
    assert renewal.next_wake > retry + 20


@pytest.mark.parametrize("code", ["lease", "role", "unsupported", "malformed"])
def test_a_final_refusal_ends_it(code: str) -> None:
    renewal = held()
    renewal.handle(Tick(), renewal.next_wake)
    assert renewal.handle(RenewalRefused(code, "why"), 23.0) == [
        Lapsed(f"refused ({code}): why", refused=True, cause="refused")
    ]


@pytest.mark.parametrize("code", ["busy", "internal"])
def test_a_passing_refusal_is_repeated(code: str) -> None:
    renewal = held()
    due = renewal.next_wake
    renewal.handle(Tick(), due)
    assert renewal.handle(RenewalRefused(code, "why"), due) == []
    assert due < renewal.next_wake < due + 1


def test_a_lost_connection_is_looked_into_at_once_and_a_dead_worker_suspected() -> None:
    renewal = held()
    assert attempted(renewal.handle(ConnectionLost(), 3.0))
    assert renewal.handle(RenewalFailed("refused", unreachable=True), 3.1) == []
    retry = renewal.next_wake
    assert retry < 3.5
    renewal.handle(Tick(), retry)
    assert renewal.handle(RenewalFailed("refused", unreachable=True), retry) == [Suspected("refused")]
    again = renewal.next_wake
    renewal.handle(Tick(), again)
    assert renewal.handle(RenewalFailed("refused", unreachable=True), again) == []
    assert renewal.expires_at == 30.0
    back = renewal.next_wake
    renewal.handle(Tick(), back)
    assert renewal.handle(Renewed(30.0), back) == [Recovered()]


def test_slow_answers_are_no_reason_for_suspicion() -> None:
    renewal = held()
    for _ in range(4):
        due = renewal.next_wake
        assert attempted(renewal.handle(Tick(), due))
        assert renewal.handle(RenewalFailed("timed out"), due) == []
    assert not renewal.suspected


def test_a_connection_lost_during_an_attempt_repeats_it_without_pause() -> None:
    renewal = held()
    due = renewal.next_wake
    renewal.handle(Tick(), due)
    renewal.handle(ConnectionLost(), due + 0.1)
    assert attempted(renewal.handle(RenewalFailed("broke", unreachable=True), due + 0.2))


def test_a_flapping_connection_does_not_make_a_tight_loop() -> None:
    renewal = held()
    now, attempts = 3.0, 0
    while now < 10.0:
        attempts += attempted(renewal.handle(ConnectionLost(), now))
        renewal.handle(RenewalFailed("broke", unreachable=True), now)
        now += 0.01
    assert attempts < 12


@pytest.mark.parametrize("life_s", [math.nan, math.inf, -1.0, 0.0])
def test_an_answer_that_makes_no_sense_is_a_failure(life_s: float) -> None:
    renewal = held()
    due = renewal.next_wake
    renewal.handle(Tick(), due)
    renewal.handle(Renewed(life_s), due)
    assert renewal.expires_at == 30.0
    assert due < renewal.next_wake < 30.0


def lapse(renewal: Renewal, began: float, gone: Callable[[], bool]) -> tuple[float, str]:
    """The connection breaks at ``began`` and no attempt reaches the lessor any more: when and why it ends."""
    now = began
    event: RenewalFailed | ConnectionLost | Tick = ConnectionLost()
    while True:
        actions = renewal.handle(event, now)
        for action in actions:
            if isinstance(action, Lapsed):
                return now, action.reason
        if attempted(actions):
            event = RenewalFailed("no luck", unreachable=True, gone=gone())
        else:
            event, now = Tick(), renewal.next_wake


def test_a_lessor_that_is_gone_is_not_waited_for_until_its_lease_ends() -> None:
    at, why = lapse(held(), 5.0, lambda: True)
    # not later: everybody waits for the parameter server that was there
    assert at - 5.0 == pytest.approx(Renewal.GONE_FOR_S)
    assert why == "nobody is there any more: no luck"


def test_a_lessor_that_is_only_cut_off_keeps_its_lease() -> None:
    """A gateway or a link that comes back must not cost the job its workers."""
    turns = itertools.cycle((True, False))
    at, _ = lapse(held(), 5.0, lambda: next(turns))
    assert at == 30.0

"""When a transfer is tried again, and when not any more."""

from __future__ import annotations

from contextlib import suppress

import pytest

from hypha.errors import Refused, TransferFailed
from hypha.net.bulk.turns import (
    BUSY_FOR_S,
    LONGEST_BUSY_PAUSE_S,
    LONGEST_PAUSE_S,
    MAX_ATTEMPTS,
    NOT_FOUND_FOR_S,
    Retries,
)

BROKEN = TransferFailed("peer", "file", "cut")
PATIENCE_S = 60.0


def lasts_s(retries: Retries, code: str) -> float:
    """For how long a peer that refuses with ``code`` is asked again."""
    now = 0.0
    while True:
        try:
            pause_s = retries.refused(Refused(code, "no"), now)
        except Refused:
            return now
        assert 0 < pause_s <= LONGEST_BUSY_PAUSE_S
        now += pause_s


@pytest.mark.parametrize(
    ("code", "patience_s", "expected_s"),
    [
        ("busy", 0.0, BUSY_FOR_S),
        ("busy", PATIENCE_S, PATIENCE_S),
        ("not-found", 0.0, 0.0),
        ("not-found", PATIENCE_S, NOT_FOUND_FOR_S),
        ("stale", PATIENCE_S, 0.0),
    ],
)
def test_who_refuses_is_asked_again_for_a_while(code: str, patience_s: float, expected_s: float) -> None:
    assert expected_s <= lasts_s(Retries(patience_s), code) <= expected_s + LONGEST_BUSY_PAUSE_S


def test_what_breaks_is_tried_a_few_times_and_anew_when_something_came() -> None:
    retries = Retries()
    for number in range(1, 10):
        retries.broke(BROKEN, float(number), offset=number)
    for number in range(10, 10 + MAX_ATTEMPTS - 2):
        retries.broke(BROKEN, float(number), offset=9)
    with pytest.raises(TransferFailed, match="cut"):
        retries.broke(BROKEN, 20.0, offset=9)


def test_whoever_has_patience_has_it_from_the_first_failure_on() -> None:
    retries = Retries(PATIENCE_S)
    now, pauses = 5.0, [0.0]
    with suppress(TransferFailed):
        while now < 1000:
            pauses.append(retries.broke(BROKEN, now))
            now += pauses[-1]
    assert PATIENCE_S - LONGEST_PAUSE_S <= now - 5.0 <= PATIENCE_S
    assert max(pauses) <= LONGEST_PAUSE_S
    assert pauses[1] < 0.5


def test_who_was_busy_and_broke_is_asked_for_as_long_again() -> None:
    retries = Retries()
    assert lasts_s(retries, "busy") >= BUSY_FOR_S
    retries.broke(BROKEN, 100.0)
    assert lasts_s(retries, "busy") >= BUSY_FOR_S

"""What a round's losses are, and how often they are told."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from hypha.errors import NotFinite
from hypha.executor.inner.round_counts import Losses


def told_at(round_s: float, batch_s: float) -> list[float]:
    """When the losses of a round of batches of ``batch_s`` are told."""
    losses, found = Losses(100.0), []
    for batch in range(1, int(round_s / batch_s) + 1):
        now = batch * batch_s
        losses.add(torch.tensor(1.0))
        if losses.due(100.0 + now):
            losses.latest(100.0 + now)
            found.append(now)
    return found


def test_means_are_of_what_was_not_told_yet_and_of_all() -> None:
    losses = Losses(0.0)
    for value in (1.0, 2.0):
        losses.add(torch.tensor(value))
    assert losses.waiting
    assert losses.latest(1.0) == 1.5
    assert not losses.waiting
    losses.add(torch.tensor(6.0))
    assert losses.latest(2.0) == 6.0
    assert losses.mean() == 3.0


def test_nothing_was_told() -> None:
    assert Losses(0.0).mean() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_an_error(value: float) -> None:
    losses = Losses(0.0)
    losses.add(torch.tensor(1.0))
    losses.add(torch.tensor(value))
    with pytest.raises(NotFinite, match="the loss is not finite"):
        losses.latest(0.1)


def test_the_first_batch_is_told_at_once() -> None:
    assert told_at(0.001, 0.001) == [0.001]


def test_a_short_round_is_told_every_twentieth_of_a_second() -> None:
    assert len(told_at(0.5, 0.001)) == pytest.approx(10, abs=1)


def test_in_a_long_round_it_becomes_rarer() -> None:
    """A tenth of the round's time so far lies between two, at most half a second."""
    times = told_at(60.0, 0.004)
    for earlier, later in pairwise(times):
        assert later - earlier <= min(max(0.05, 0.1 * later), 0.5) + 0.004 + 1e-9
    # 10 in the first half second, some 24 until five, two a second then: not 1200
    assert len(times) == pytest.approx(10 + 24 + 110, rel=0.1)


def test_long_batches_are_told_one_by_one() -> None:
    assert len(told_at(30.0, 1.0)) == 30

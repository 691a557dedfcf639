"""Resources: fitting, sums, weights, batch sizes; amounts that make no sense are refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypha.messages import Resources
from hypha.rules.resources import add_up, batch_size, check, fits, is_valid, left_of, weighted_capacity

amounts = st.floats(min_value=0, max_value=1e6)
resources = st.builds(Resources, cpu=amounts, memory=amounts, gpu=amounts, storage=amounts)
nonsense = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -1e-300])


def test_more_of_one_and_less_of_another_does_not_fit() -> None:
    have = Resources(cpu=64, memory=8, gpu=16, storage=100)
    assert not fits(Resources(cpu=1, memory=1, gpu=80), have)
    assert not fits(have, Resources(cpu=1, memory=1, gpu=80))
    assert fits(Resources(cpu=64, gpu=16), have)


@pytest.mark.parametrize("name", ["cpu", "memory", "gpu", "storage"])
@given(bad=nonsense)
def test_nonsense_never_fits_and_is_refused(name: str, bad: float) -> None:
    wrong = Resources(**{name: bad})
    assert not is_valid(wrong)
    assert not fits(wrong, Resources(cpu=1e9, memory=1e9, gpu=1e9, storage=1e9))
    assert not fits(Resources(), wrong)
    with pytest.raises(ValueError, match=f"lease: {name}"):
        check(wrong, "lease")
    with pytest.raises(ValueError, match=name):
        add_up([Resources(), wrong])
    with pytest.raises(ValueError, match=name):
        weighted_capacity(wrong)


@given(resources, resources)
def test_what_fits_can_be_taken_and_what_does_not_cannot(part: Resources, whole: Resources) -> None:
    if fits(part, whole):
        rest = left_of(whole, part)
        assert is_valid(rest)
        back = add_up([rest, part])
        for name in ("cpu", "memory", "gpu", "storage"):
            assert getattr(back, name) == pytest.approx(getattr(whole, name), abs=1e-8)
    else:
        with pytest.raises(ValueError, match="is more than"):
            left_of(whole, part)


def test_decimal_fractions_leave_room_for_what_is_left() -> None:
    used = add_up([Resources(memory=0.1), Resources(memory=0.1)])
    free = left_of(Resources(memory=0.3), used)
    assert free.memory < 0.1
    assert fits(Resources(memory=0.1), free)


@given(st.lists(resources, max_size=6), st.randoms())
def test_a_sum_does_not_depend_on_the_order(parts: list[Resources], random: object) -> None:
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert add_up(parts) == add_up(shuffled)


def test_weights() -> None:
    assert weighted_capacity(Resources(gpu=2, cpu=4, memory=16, storage=100)) == pytest.approx(56.6)
    assert weighted_capacity(Resources()) == 0
    assert weighted_capacity(Resources(gpu=1.7e308, cpu=1.7e308)) == math.inf


@pytest.mark.parametrize(
    ("offered", "required", "size"),
    [
        (Resources(gpu=40), Resources(gpu=10), 4),
        (Resources(gpu=39), Resources(gpu=10), 3),
        (Resources(memory=64, gpu=40), Resources(memory=1, gpu=10), 4),
        (Resources(memory=8), Resources(memory=1), 8),
        (Resources(memory=0.3), Resources(memory=0.1), 3),
        # who offers no more than was asked for, as is the default, says nothing of samples
        (Resources(gpu=10), Resources(gpu=10), 16),
        (Resources(gpu=19.9), Resources(gpu=10), 16),
        (Resources(gpu=20), Resources(gpu=10), 2),
        (Resources(memory=1), Resources(memory=2), 16),
        (Resources(memory=1000), Resources(memory=1), 64),
        (Resources(memory=1), Resources(memory=5e-324), 64),
        (Resources(memory=1), Resources(cpu=1), 16),
    ],
)
def test_batch_size_is_offered_over_required_within_bounds(
    offered: Resources, required: Resources, size: int
) -> None:
    assert batch_size(offered, required, 64, 16) == size


@given(resources, resources, st.integers(2, 512), st.integers(2, 64))
def test_a_batch_is_never_of_one_sample_unless_that_is_the_maximum(
    offered: Resources, required: Resources, maximum: int, default: int
) -> None:
    assert 2 <= batch_size(offered, required, maximum, default) <= maximum
    assert batch_size(offered, required, 1, default) == 1


def test_a_batch_size_needs_sane_bounds() -> None:
    with pytest.raises(ValueError, match="of 0 at most"):
        batch_size(Resources(), Resources(), 0, 16)
    with pytest.raises(ValueError, match="offered: gpu"):
        batch_size(Resources(gpu=math.nan), Resources(gpu=1), 8, 16)

"""Batches that grow."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hypha.executor.inner.batch_size import BatchSize


def sizes(size: BatchSize, seconds: Callable[[int], float], fits: Callable[[int], bool]) -> list[int]:
    """Of eight rounds; ``seconds`` a batch of so many rows takes."""
    found = []
    for _ in range(8):
        found.append(size.rows)
        size.round_ended(10, 10 * seconds(size.rows), fits(size.rows))
    return found


@pytest.mark.parametrize(
    ("most", "seconds", "limit", "expected"),
    [
        # each takes the same time, up to what is allowed
        (100, lambda rows: 1.0, 1000, [16, 32, 64, 100, 100, 100, 100, 100]),
        # twice the rows take twice the time
        (100, lambda rows: rows / 10, 1000, [16, 32, 16, 16, 16, 16, 16, 16]),
        (100, lambda rows: max(1.0, rows / 40), 1000, [16, 32, 64, 100, 64, 64, 64, 64]),
        # memory ends it
        (100, lambda rows: 1.0, 40, [16, 32, 64, 32, 32, 32, 32, 32]),
        (100, lambda rows: 1.0, 8, [16] * 8),
        (None, lambda rows: 1.0, 1000, [16] * 8),
        (16, lambda rows: 1.0, 1000, [16] * 8),
    ],
    ids=["to the most", "no faster", "faster for a while", "memory", "too large at first", "off", "no room"],
)
def test_batches_grow_while_memory_and_speed_allow(
    most: int | None, seconds: Callable[[int], float], limit: int, expected: list[int]
) -> None:
    found = sizes(BatchSize(16, most), seconds, lambda rows: rows <= limit)
    assert found == expected


def test_a_round_of_a_few_batches_says_nothing_of_speed() -> None:
    size = BatchSize(8, 64)
    size.round_ended(2, 1.0, True)
    assert size.rows == 8
    size.round_ended(4, 1.0, True)
    assert size.rows == 16

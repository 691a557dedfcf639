from __future__ import annotations

import subprocess
import sys
from random import Random

from hypha.backoff import NO_JITTER, Backoff, pause_after
from hypha.runtime import Runtime, use_runtime


class Seeded(Runtime):
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)


def pauses_of(seed: int) -> list[float]:
    with use_runtime(Seeded(seed)):
        backoff = Backoff(1.0, 10.0)
        return [backoff.next_s() for _ in range(6)]


def test_pauses_double_up_to_their_limit() -> None:
    backoff = Backoff(1.0, 10.0, jitter=NO_JITTER)
    assert [backoff.next_s() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    backoff.reset()
    assert backoff.next_s() == 1.0
    for _ in range(2000):  # a day of failures
        assert backoff.next_s() <= 10.0


def test_pauses_grow_as_fast_as_they_are_told_to() -> None:
    assert [pause_after(failures, 0.2, 60.0, growth=4.0) for failures in (0, 1, 2, 9)] == [
        0.2,
        0.8,
        3.2,
        60.0,
    ]


def test_jitter_leaves_a_share_of_each_pause() -> None:
    for seed in range(100):
        for pause_s, whole_s in zip(pauses_of(seed), (1.0, 2.0, 4.0, 8.0, 10.0, 10.0), strict=True):
            assert whole_s / 2 <= pause_s <= whole_s


def test_a_seed_decides_the_jitter() -> None:
    assert pauses_of(7) == pauses_of(7)
    assert pauses_of(7) != pauses_of(8)


def test_an_executor_that_imports_it_has_no_trio() -> None:
    program = "import sys, hypha.backoff; hypha.backoff.Backoff(1.0, jitter=hypha.backoff.NO_JITTER).next_s()"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'trio' not in sys.modules"], check=True)

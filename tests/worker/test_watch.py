"""Who is taken for hung: a silent executor, not a waiting one, and nobody while the worker itself slept."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
from tests.worker.test_process import train_job

from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.messages import Alive, Event, Loaded, Progress
from hypha.worker.jobs.watch import LOADING_S, Patience, Watch

PROGRESS = Progress(round=0, batches=1, samples=1, busy_s=0.1, loss=1.0)


def found(patience: Patience, said: Iterable[tuple[float, Event]], until_s: float = 5000.0) -> float | None:
    """When, on a clock that begins at 0, the executor that said this is found to hang."""
    watch, now, events = Watch(patience, 0.0), 0.0, sorted(said, key=lambda one: one[0])
    while now < until_s:
        while events and events[0][0] <= now:
            watch.sign(events.pop(0)[1], now)
        if watch.look(now):
            return now
        now += watch.pause_s
    return None


LOADED = (20.0, Loaded(incarnation="i"))


def test_silence_after_the_last_sign() -> None:
    signs = [LOADED, *((20.0 + at, PROGRESS) for at in range(100))]
    assert found(Patience(60.0), signs) == pytest.approx(119.0 + 60.0, abs=6.0)


def test_a_long_wait_is_no_hang() -> None:
    assert found(Patience(60.0), [LOADED, *((float(at), Alive()) for at in range(20, 5000, 30))]) is None


def test_the_job_can_ask_for_less_and_not_for_more() -> None:
    assert found(Patience(60.0, 10.0), [LOADED]) == pytest.approx(30.0, abs=1.0)
    assert found(Patience(60.0, 1000.0), [LOADED]) == pytest.approx(80.0, abs=6.0)
    assert found(Patience(0.0, 10.0), [LOADED]) is None, "its owner switched it off"


def test_loading_takes_its_time() -> None:
    assert found(Patience(10.0), []) == pytest.approx(LOADING_S, abs=1.0)
    assert found(Patience(600.0), []) == pytest.approx(600.0, abs=5.0)


def test_a_stranger_is_watched_from_its_first_alive() -> None:
    stranger = Patience(60.0, always=False)
    assert found(stranger, [LOADED, (30.0, PROGRESS)]) is None
    assert found(stranger, [LOADED, (30.0, Alive()), (40.0, PROGRESS)]) == pytest.approx(100.0, abs=6.0)


def test_a_worker_that_slept_itself_accuses_nobody() -> None:
    watch = Watch(Patience(60.0), 0.0)
    watch.sign(LOADED[1], 1.0)
    assert not watch.look(5.0)
    assert not watch.look(1000.0)
    watch.sign(PROGRESS, 1000.1)
    assert not any(watch.look(1000.0 + at) for at in range(0, 60, 5))
    assert watch.look(1061.0)
    assert watch.verdict.startswith("it hung: no sign of life for 61 s (60 are allowed)")
    assert "'progress'" in watch.verdict


def test_whose_word_counts() -> None:
    worker = WorkerConfig.model_construct(hang_s=100.0)
    job = msgspec.structs.replace(train_job(), hang_s=30.0)
    own = ExecutorConfig(kind="train", name="own")
    foreign = ExecutorConfig(kind="train", name="foreign", cmd="run")
    assert Patience.of(worker, own, job) == Patience(100.0, 30.0, True)
    assert Patience.of(worker, foreign, job) == Patience(100.0, 30.0, False)
    told = foreign.model_copy(update={"hang_s": 20.0})
    assert Patience.of(worker, told, job) == Patience(20.0, 30.0, True)
    assert Patience.of(worker, told, job).working_s == 20.0

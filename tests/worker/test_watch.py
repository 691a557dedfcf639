"""Who is taken for hung: a silent executor, not a waiting one, and nobody while the worker itself slept."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest
from tests.worker.test_process import train_job

from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.messages import Alive, Event, Loaded, Progress
from hypha.worker.jobs.watch import LOADING_S, Watch

PROGRESS = Progress(round=0, batches=1, samples=1, busy_s=0.1, loss=1.0)


def patience(hang_s: float, shorter_s: float | None = None, cmd: str | None = None) -> Watch:
    """Of an executor, started at 0, whose worker and whose job have these bounds."""
    worker = WorkerConfig.model_construct(hang_s=hang_s)
    executor = ExecutorConfig(kind="train", name="some", cmd=cmd)
    return Watch(worker, executor, msgspec.structs.replace(train_job(), hang_s=shorter_s), 0.0)


def found(watch: Watch, said: Iterable[tuple[float, Event]], until_s: float = 5000.0) -> float | None:
    """When, on a clock that begins at 0, the executor that said this is found to hang."""
    now, events = 0.0, sorted(said, key=lambda one: one[0])
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
    assert found(patience(60.0), signs) == pytest.approx(119.0 + 60.0, abs=6.0)


def test_a_long_wait_is_no_hang() -> None:
    assert found(patience(60.0), [LOADED, *((float(at), Alive()) for at in range(20, 5000, 30))]) is None


def test_the_job_can_ask_for_less_and_not_for_more() -> None:
    assert found(patience(60.0, 10.0), [LOADED]) == pytest.approx(30.0, abs=1.0)
    assert found(patience(60.0, 1000.0), [LOADED]) == pytest.approx(80.0, abs=6.0)
    assert found(patience(0.0, 10.0), [LOADED]) is None, "its owner switched it off"


def test_loading_takes_its_time() -> None:
    assert found(patience(10.0), []) == pytest.approx(LOADING_S, abs=1.0)
    assert found(patience(600.0), []) == pytest.approx(600.0, abs=5.0)


def test_a_stranger_is_watched_from_its_first_alive() -> None:
    assert found(patience(60.0, cmd="run"), [LOADED, (30.0, PROGRESS)]) is None
    assert found(patience(60.0, cmd="run"), [LOADED, (30.0, Alive()), (40.0, PROGRESS)]) == pytest.approx(
        100.0, abs=6.0
    )


def test_a_worker_that_slept_itself_accuses_nobody() -> None:
    watch = patience(60.0)
    watch.sign(LOADED[1], 1.0)
    assert not watch.look(5.0)
    assert not watch.look(1000.0)
    watch.sign(PROGRESS, 1000.1)
    assert not any(watch.look(1000.0 + at) for at in range(0, 60, 5))
    assert watch.look(1061.0)
    assert watch.verdict.startswith("it hung: no sign of life for 61 s (60 are allowed)")
    assert "'progress'" in watch.verdict


def test_whose_word_counts() -> None:
    own, foreign = patience(100.0, 30.0), patience(100.0, 30.0, cmd="run")
    assert found(own, [LOADED]) == pytest.approx(50.0, abs=3.0)
    assert found(foreign, [LOADED]) is None
    worker = WorkerConfig.model_construct(hang_s=100.0)
    told = ExecutorConfig(kind="train", name="foreign", cmd="run", hang_s=20.0)
    job = msgspec.structs.replace(train_job(), hang_s=30.0)
    assert found(Watch(worker, told, job, 0.0), [LOADED]) == pytest.approx(40.0, abs=2.0)

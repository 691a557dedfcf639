"""The child process that tries a batch: it is there for one trial, and whatever becomes of it is a report."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil
import pytest
import trio

from hypha.messages import Column, ExecutorDescriptor, ModelSpec, PeerRef, TrainJob, Trial
from hypha.scheduler.preflight.trial import ModelTrial, open_trial


def of_linear(features: int) -> Trial:
    job = TrainJob(
        job_id="",
        generation=0,
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        me="",
        scheduler=PeerRef(peer=""),
        parameter_server=PeerRef(peer=""),
        model=ModelSpec(
            task="torch",
            entrypoint="torch.nn:Linear",
            arguments={"in_features": features, "out_features": 3},
            inputs={"input": "x", "labels": "labels"},
            loss="cross-entropy",
        ),
        dataset="d",
        batch_size=0,
    )
    columns = (Column(name="x", dtype="F32", shape=(4,)), Column(name="labels", dtype="I64", shape=()))
    return Trial(job=job, model=None, preprocessor=None, weights=True, columns=columns, ranges=(), rows=2)


def children() -> list[psutil.Process]:
    found = []
    for one in psutil.Process().children():
        # what another test has started may be gone meanwhile
        with contextlib.suppress(psutil.NoSuchProcess):
            if "hypha.executor.trial" in " ".join(one.cmdline()):
                found.append(one)
    return found


async def test_a_child_tries_a_batch_and_is_gone() -> None:
    async with open_trial("torch") as trial:
        assert trial is not None
        assert len(children()) == 1, "it imports while the dataset is looked for"
        report = await trial.run(of_linear(4), 90)
        assert (report.outcome, report.parameters) == ("passed", 15)
    assert children() == []
    async with open_trial(None) as nothing:
        assert nothing is None
        assert children() == []


async def test_one_that_dies_or_takes_too_long_judges_nothing() -> None:
    async with open_trial("torch") as trial:
        assert trial is not None
        (child,) = children()
        os.kill(child.pid, signal.SIGSTOP)
        late = await trial.run(of_linear(4), 0.1)
        assert (late.outcome, late.reason) == ("unknown", "it took longer than 0.1 s")
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(0.05)
                os.kill(child.pid, signal.SIGKILL)

            nursery.start_soon(kill)
            killed = await trial.run(of_linear(4), 60)
        assert killed.outcome == "unknown"
        assert "exit code -9" in killed.reason
    assert children() == []


async def test_one_that_gave_up_waiting_is_started_anew() -> None:
    async with open_trial("torch") as trial:
        assert trial is not None
        (first,) = children()
        first.kill()
        with trio.fail_after(10):
            while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:
                await trio.sleep(0.01)
        report = await trial.run(of_linear(5), 90)
    assert report.outcome == "failed"
    assert "x float32[2, 4]" in report.reason


async def test_without_torch_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = ModelTrial("torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    await trial.start()
    report = await trial.run(of_linear(4), 1)
    assert report.outcome == "unknown"
    assert "torch is not installed" in report.reason

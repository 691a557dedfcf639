"""Sinks that fail, hang, are slow or full harm nobody, say so once, and get what they missed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.sinks.endpoints import bridge, hanging
from tests.support.disks import small_disks
from tests.support.polling import until
from tests.support.stopwatch import Stopwatch

from hypha.sinks import Destination, RoundValues, RunInfo, SinkProcess
from hypha.sinks import process as sink_process

RUN = RunInfo("job-0123", {"seed": 0})


def values(round_: int) -> RoundValues:
    return RoundValues(round_, 1000.0 + round_, {"loss": 1 / round_}, {"worker-1": {"loss": 2 / round_}})


def http(url: str, token: str | None = None) -> Destination:
    return Destination("http", "hypha", "digits", "/nonexistent", url=url, token=token)


@asynccontextmanager
async def opened(
    destination: Destination, patience_s: float = 60.0, close_s: float = 5.0
) -> AsyncIterator[SinkProcess]:
    sink = SinkProcess(destination, RUN, patience_s=patience_s)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sink.run)
            yield sink
            sink.close(close_s)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hypha.sinks.process"]


async def test_the_status_bridge_gets_what_the_rust_hypha_sent() -> None:
    with bridge() as server:
        async with opened(http(server.url, "secret-token")) as sink:
            sink.put(values(1))
            await until(lambda: len(server.got) == 2)
            assert server.got == [
                {"worker_id": "digits", "round": 1, "metric_name": "loss", "value": 1.0},
                {"worker_id": "worker-1", "round": 1, "metric_name": "loss", "value": 2.0},
            ]
            assert server.paths == {"/status"}
            assert server.authorization == {"Bearer secret-token"}


async def test_an_outage_is_said_once_and_over_once_and_no_round_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with bridge() as server:
        async with opened(http(server.url)) as sink:
            server.status = 503
            for round_ in (1, 2, 3):
                sink.put(values(round_))
            await until(lambda: len(said(caplog)) == 1)
            # refused again before it works
            await trio.sleep(1.5)
            server.status = 200
            await until(lambda: {body["round"] for body in server.got} == {1, 2, 3})
            await until(lambda: len(said(caplog)) == 2)
    first, second = said(caplog)
    assert "http does not work: HyphaError: the bridge answered 503 to loss" in first
    assert "http works again; 0 rounds are missing there" in second


async def test_a_server_that_accepts_and_never_answers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with hanging() as port:
        async with opened(http(f"http://127.0.0.1:{port}"), patience_s=0.5, close_s=0.4) as sink:
            began = Stopwatch()
            for round_ in range(1, 501):
                sink.put(values(round_))
            # each would wait for half a second
            assert began.elapsed_s() < 10
            await until(lambda: len(said(caplog)) == 1)
            assert "it gave no reply for 0.5 s" in said(caplog)[0]
            began = Stopwatch()
        assert began.elapsed_s() < 1.5
    assert sink.dropped == 500
    assert said(caplog)[1:] == ["The metric sink http lacks 500 rounds."]


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_process, "KEPT", 3)
    with bridge() as server:
        async with opened(http(server.url)) as sink:
            server.status = 500
            for round_ in range(1, 11):
                sink.put(values(round_))
            await until(lambda: sink.dropped == 7)
            server.status = 200
            await until(lambda: {body["round"] for body in server.got} == {8, 9, 10})


async def test_no_error_of_a_sink_ends_the_job(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody foresaw, while it closes."""

    end_child = sink_process.SinkProcess._end_child

    async def broken(self: sink_process.SinkProcess) -> None:
        await end_child(self)
        raise ValueError("unforeseen")

    with bridge() as server:
        async with opened(http(server.url)) as sink:
            sink.put(values(1))
            await until(lambda: not sink.waiting)
            monkeypatch.setattr(sink_process.SinkProcess, "_end_child", broken)
    assert said(caplog)[-1] == "The metric sink http failed."


@pytest.mark.real
async def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with small_disks(tmp_path, "board", megabytes=1) as (disk,):
        destination = Destination("tensorboard", "hypha", "digits", str(disk.path))
        async with opened(destination) as sink:
            sink.put(values(1))
            await until(lambda: not sink.waiting, 30)
            disk.fill()
            # a tag that is longer than what is left of the last page
            for round_ in (2, 3):
                long = {f"figure-{number:04}": 1.0 for number in range(400)}
                sink.put(RoundValues(round_, 1000.0, {"loss": 1 / round_, **long}))
            await until(lambda: len(said(caplog)) == 1, 30)
            assert "tensorboard does not work: OSError: [Errno 28] No space left" in said(caplog)[0]
            disk.make_space()
            await until(lambda: not sink.waiting, 30)
            await until(lambda: len(said(caplog)) == 2)
        read = EventAccumulator(str(disk.path / RUN.job_id))
        read.Reload()
        assert [one.step for one in read.Scalars("loss")] == [1, 2, 3]


async def test_a_process_that_was_killed_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with bridge() as server:
        async with opened(http(server.url)) as sink:
            sink.put(values(1))
            await until(lambda: len(server.got) == 2)
            (child,) = _children()
            child.kill()
            sink.put(values(2))
            await until(lambda: {body["round"] for body in server.got} == {1, 2})
            await until(lambda: len(said(caplog)) == 2)
    assert _children() == []


async def test_its_process_ends_when_the_scheduler_is_killed(tmp_path: Path) -> None:
    with bridge() as server:
        script = (
            "import trio\n"
            "from hypha.sinks import *\n"
            f"place = Destination('http', 'hypha', 'digits', '/nonexistent', url={server.url!r})\n"
            "async def main():\n"
            "    sink = SinkProcess(place, RunInfo('job'))\n"
            "    sink.put(RoundValues(1, 0.0, {'loss': 1.0}))\n"
            "    await sink.run()\n"
            "trio.run(main)\n"
        )
        scheduler = await trio.to_thread.run_sync(subprocess.Popen, [sys.executable, "-c", script])
        await until(lambda: len(server.got) == 1)
        (child,) = _children(scheduler.pid)
        scheduler.kill()
        scheduler.wait()
        await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


async def test_a_token_is_in_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with bridge() as server:
        async with opened(http(f"{server.url}/token-0123456789", "token-0123456789")) as sink:
            sink.put(values(1))
            await until(lambda: len(server.got) == 2)
            (child,) = _children()
            shown = " ".join(child.cmdline()) + str(child.environ())
            server.status = 403
            sink.put(values(2))
            await until(lambda: len(said(caplog)) == 1)
    assert "token-0123456789" not in caplog.text + shown


def _children(of: int | None = None) -> list[psutil.Process]:
    found = psutil.Process(of).children(recursive=True)
    return [one for one in found if "hypha.sinks.child" in one.cmdline()]

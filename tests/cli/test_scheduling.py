"""The live page of a job as its scheduler serves it: who is let in, who is told the token, the last news."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from tests.support.polling import until
from tests.telemetry.test_page import read

from hypha.cli.job.scheduling import JobPage, serve_page
from hypha.errors import JobFailed
from hypha.scheduler.status.history import History
from hypha.scheduler.status.snapshot import JobSnapshot


async def address_in(caplog: pytest.LogCaptureFixture) -> str:
    """Where it listens, from this machine."""

    def found() -> list[str]:
        return [record.http_address for record in caplog.records if hasattr(record, "http_address")]

    await until(lambda: bool(found()))
    return found()[0].replace("0.0.0.0", "127.0.0.1")


async def test_beyond_loopback_only_the_token_lets_in_and_the_log_does_not_have_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    page = JobPage(JobSnapshot("digits", round=3), History(), tuple)
    over = trio.Event()

    async def job(*, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started(None)
        await over.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_page, "0.0.0.0:0", tmp_path, job, page)
        address = await address_in(caplog)
        token = (tmp_path / "page-token").read_text().strip()
        await until(lambda: "page-token" in caplog.text)
        assert token not in caplog.text + "".join(capsys.readouterr())
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
            assert (await client.get("/status")).status_code == 401
            assert (await client.get("/status", params={"token": token})).json()["round"] == 3
        over.set()


async def test_who_looks_is_told_how_the_job_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    page = JobPage(JobSnapshot("digits", state="training"), History(), tuple)
    looking = trio.Event()
    seen: list[tuple[str, dict[str, Any]]] = []

    async def job(*, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started(None)
        await looking.wait()
        await trio.sleep(0.2)
        page.job = JobSnapshot("digits", state="failed", message="nobody offers a GPU")
        raise JobFailed("nobody offers a GPU")

    async def look() -> None:
        address = await address_in(caplog)
        looking.set()
        seen.extend(await read(address, 1000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with pytest.RaisesGroup(JobFailed, allow_unwrapped=False, flatten_subgroups=True):
            await serve_page("127.0.0.1:0", tmp_path, job, page)
    assert [name for name, _ in seen[-2:]] == ["now", "end"]
    assert seen[-2][1]["job"]["message"] == "nobody offers a GPU"
    assert not (tmp_path / "page-token").exists()

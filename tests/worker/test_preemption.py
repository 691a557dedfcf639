"""Notices of a machine's end: each way is noticed, none is made up, and who cannot look says so once."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from hypha.config.models import PreemptionConfig
from hypha.worker.leasing import preemption
from hypha.worker.leasing.preemption import notice_left_s, watch_for_notice

POLL_S = 0.1


def config(**keys: object) -> PreemptionConfig:
    return PreemptionConfig.model_validate({"notice_s": 30.0, "poll_s": POLL_S, **keys})


async def is_quiet(watched: PreemptionConfig) -> bool:
    """Five looks, and no notice."""
    with trio.move_on_after(5 * POLL_S):
        await watch_for_notice(watched)
        return False
    return True


@asynccontextmanager
async def metadata_service() -> AsyncIterator[tuple[str, list[bytes], list[bytes]]]:
    """Its address, the answer that it gives (the last of the list), and what it was asked."""
    answers, asked = [b"404 Not Found\r\ncontent-length: 0\r\n\r\n"], list[bytes]()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += await stream.receive_some()
            asked.append(request)
            await stream.send_all(b"HTTP/1.1 " + answers[-1])

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}/preempted", answers, asked
        nursery.cancel_scope.cancel()


def said(body: bytes) -> bytes:
    return b"200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def test_without_a_way_there_is_never_a_notice() -> None:
    assert await is_quiet(PreemptionConfig())
    assert await is_quiet(config())


async def test_a_file_that_appears(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    assert await is_quiet(config(file=file))
    file.touch()
    with trio.fail_after(10.0):
        assert await watch_for_notice(config(file=file)) == "preemption.file is there"


async def test_a_command_that_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    script = f"import os, sys; sys.exit(0 if os.path.exists({str(file)!r}) else 3)"
    watched = config(command=[sys.executable, "-S", "-c", script])
    with trio.fail_after(30.0):
        async with trio.open_nursery() as nursery:
            found: list[str] = []

            async def watch() -> None:
                found.append(await watch_for_notice(watched))

            nursery.start_soon(watch)
            await trio.sleep(1.0)
            assert found == []
            file.touch()
    assert found == ["preemption.command says so"]


async def test_an_address_of_the_metadata_service() -> None:
    async with metadata_service() as (url, answers, asked):
        headers = {"Metadata-Flavor": "Google"}
        # there is nothing, as at AWS, or a word that says no, as at Google
        assert await is_quiet(config(url=url))
        answers.append(said(b"FALSE"))
        watched = config(url=url, url_pattern="TRUE", url_headers=headers)
        assert await is_quiet(watched)
        assert b"metadata-flavor: google" in asked[-1].lower()
        answers.append(said(b"TRUE"))
        with trio.fail_after(10.0):
            assert await watch_for_notice(watched) == "preemption.url says so"
            assert await watch_for_notice(config(url=url)) == "preemption.url says so"


async def test_what_cannot_be_looked_at_is_no_notice_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with metadata_service() as (url, _, _):
        pass
    # it has ended: nobody listens there
    watched = config(url=url, command=[str(tmp_path / "no-such-program")])
    with trio.move_on_after(10 * POLL_S):
        await watch_for_notice(watched)
        raise AssertionError("there was no notice")
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 2
    assert any(url in one for one in warnings)
    assert any("no-such-program" in one for one in warnings)


async def test_a_command_that_hangs_is_killed_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preemption, "LOOK_S", 0.3)
    watched = config(command=[sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with trio.move_on_after(1.5) as scope:
        await watch_for_notice(watched)
    assert scope.cancelled_caught
    assert "did not end within 0.3 s" in caplog.text


@pytest.mark.parametrize(
    ("notice_s", "poll_s", "sigterm_s", "polled_s"),
    [(30.0, 2.0, 29.0, 27.0), (10.0, 0.5, 9.0, 8.5), (4.0, 2.0, 3.0, 2.0), (2.0, 1.0, 1.0, 1.0)],
)
def test_of_a_notice_the_process_itself_and_the_look_take_their_part(
    notice_s: float, poll_s: float, sigterm_s: float, polled_s: float
) -> None:
    found = config(notice_s=notice_s, poll_s=poll_s)
    assert notice_left_s(found, polled=False) == sigterm_s
    assert notice_left_s(found, polled=True) == polled_s
    assert notice_left_s(PreemptionConfig(), polled=False) is None

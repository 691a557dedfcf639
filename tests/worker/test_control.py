"""What an operator tells a worker over its Unix socket: who may, what it does, and what is said otherwise."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from tests.support.network import Network

from hypha.config.offers import OfferConfig
from hypha.errors import HyphaError
from hypha.journal import Journal
from hypha.messages import ExecutorDescriptor, Resources
from hypha.worker.control import Call, send_call, serve_control, socket_in
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.leaving import Leaving
from hypha.worker.leasing.service import LeaseService
from hypha.worker.leasing.terms import WorkerCapacity

T = TypeVar("T")


@asynccontextmanager
async def controlled(network: Network, work_dir: Path) -> AsyncIterator[tuple[Leaving, LeaseService]]:
    """A worker's leases and its socket, on a node that is connected with nobody."""
    async with network.leaf("worker", [], connected=False) as node, trio.open_nursery() as nursery:
        arbiter = Arbiter(
            WorkerCapacity(Resources(cpu=1.0), [ExecutorDescriptor(kind="train", name="t")]),
            OfferConfig(),
            node.ref,
            journal=Journal(checked=True),
        )
        lease_service = LeaseService(arbiter, lambda _: None)
        leaving = Leaving(node, lease_service)
        await nursery.start(serve_control, work_dir, leaving, lambda: len(lease_service.leases))
        yield leaving, lease_service
        nursery.cancel_scope.cancel()


async def asked(call: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(call)


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(tmp_path / "pki")


async def test_a_worker_is_drained_and_makes_offers_again(network: Network, tmp_path: Path) -> None:
    async with controlled(network, tmp_path) as (leaving, lease_service):
        assert stat.S_IMODE(socket_in(tmp_path).stat().st_mode) == 0o600
        answer, _ = await asked(lambda: send_call(tmp_path, Call(what="drain")))
        assert (answer.state, answer.leases, answer.refused) == ("is drained, and makes no new offers", 0, "")
        assert lease_service.arbiter.closed
        answer, _ = await asked(lambda: send_call(tmp_path, Call(what="resume")))
        assert answer.state == "makes offers"
        assert not lease_service.arbiter.closed
        for within_s in (0.0, -1.0):
            answer, _ = await asked(lambda: send_call(tmp_path, Call(what="leave", within_s=within_s)))  # noqa: B023
            assert "no time to leave within" in answer.refused
        assert leaving.ends_at is None
    assert not socket_in(tmp_path).exists()


async def test_whoever_has_it_leave_waits_until_it_has_ended(network: Network, tmp_path: Path) -> None:
    ended: list[bool] = []

    async def leave() -> None:
        answer, gone = await asked(lambda: send_call(tmp_path, Call(what="leave", within_s=30.0), 30.0))
        assert answer.state.startswith("ends in ")
        ended.append(gone)

    async with trio.open_nursery() as nursery:
        async with controlled(network, tmp_path) as (leaving, _):
            nursery.start_soon(leave)
            with trio.fail_after(10.0):
                while leaving.ends_at is None:
                    await trio.sleep(0.01)
            assert leaving.reason == "its operator drains it"
            assert ended == []
    assert ended == [True]


async def test_a_worker_that_does_not_end_in_time_is_told_so(network: Network, tmp_path: Path) -> None:
    async with controlled(network, tmp_path):
        _, gone = await asked(lambda: send_call(tmp_path, Call(what="leave", within_s=30.0), 0.1))
        assert not gone


async def test_a_long_work_dir_is_no_obstacle(network: Network, tmp_path: Path) -> None:
    work_dir = tmp_path / ("long-" * 30)
    work_dir.mkdir()
    async with controlled(network, work_dir) as (_, lease_service):
        await asked(lambda: send_call(work_dir, Call(what="drain")))
        assert lease_service.arbiter.closed


async def test_a_socket_that_was_left_is_replaced_and_one_in_use_is_not(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    socket_in(tmp_path).write_text("what a killed worker left")
    async with controlled(network, tmp_path) as (_, first):
        async with controlled(network, tmp_path) as (_, second):
            assert "cannot be drained by command" in caplog.text
            await asked(lambda: send_call(tmp_path, Call(what="drain")))
            assert (first.arbiter.closed, second.arbiter.closed) == (True, False)


async def test_what_is_no_call_ends_its_connection_alone(network: Network, tmp_path: Path) -> None:
    async with controlled(network, tmp_path) as (_, lease_service):
        for text in (b"{}\n", b"\xff" * 5000, b'{"what": "explode"}\n', b""):
            async with await trio.open_unix_socket(str(socket_in(tmp_path))) as stream:
                await stream.send_all(text)
                await stream.send_eof()
                assert await stream.receive_some() == b""
        await asked(lambda: send_call(tmp_path, Call(what="drain")))
        assert lease_service.arbiter.closed


async def test_without_a_worker_the_error_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(HyphaError, match=f"no worker runs with the work directory {tmp_path}"):
        send_call(tmp_path, Call(what="drain"))
    socket_in(tmp_path).write_text("no socket")
    with pytest.raises(HyphaError, match="no worker answers at"):
        send_call(tmp_path, Call(what="drain"))

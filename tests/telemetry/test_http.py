"""Local HTTP: what it answers, and that a bad address is told."""

from __future__ import annotations

from functools import partial

import httpx
import pytest
import trio
from tests.support.polling import until

from hypha.errors import ConfigError
from hypha.messages import HealthReport, Resources
from hypha.telemetry import serve_http


def report(healthy: bool) -> HealthReport:
    return HealthReport(healthy=healthy, component="hypha-worker", version="1", peer="12D3", uptime_s=2.5)


async def test_health_and_status() -> None:
    healthy = True
    async with trio.open_nursery() as nursery:
        address = await nursery.start(
            partial(serve_http, "127.0.0.1:0", lambda: report(healthy), lambda: Resources(cpu=2.0))
        )
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
            answer = await client.get("/health")
            assert (answer.status_code, answer.json()["component"]) == (200, "hypha-worker")
            assert (await client.get("/status")).json() == {"cpu": 2.0}
            assert (await client.get("/nowhere")).status_code == 404
            assert (await client.post("/health")).status_code == 405
            healthy = False
            assert (await client.get("/health")).status_code == 503
        nursery.cancel_scope.cancel()


async def test_without_a_status_there_is_none() -> None:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
            assert (await client.get("/status")).status_code == 404
        nursery.cancel_scope.cancel()


async def test_an_address_in_use_is_a_configuration_error() -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="http_address: cannot listen on"):
            await serve_http(address, lambda: report(True))


async def test_it_ends_at_once_with_a_client_connected() -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
            async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
                await client.get("/health")
                nursery.cancel_scope.cancel()


async def test_a_client_that_has_left_leaves_nothing() -> None:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
        host, _, port = address.rpartition(":")
        before = trio.lowlevel.current_statistics().tasks_living
        for request in (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /he", b""):
            stream = await trio.open_tcp_stream(host, int(port))
            await stream.send_all(request)
            if request.endswith(b"\r\n\r\n"):
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            await stream.aclose()
        # a connection that nobody uses any more lives for 5 s
        await until(lambda: trio.lowlevel.current_statistics().tasks_living == before, 2.0)
        nursery.cancel_scope.cancel()

"""Local HTTP: what it answers, and that a bad address is told."""

from __future__ import annotations

from functools import partial

import httpx
import pytest
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tests.support.polling import until
from tests.support.stopwatch import Stopwatch

from hypha.errors import AddressTaken, ConfigError
from hypha.messages import HealthReport, Resources
from hypha.telemetry import serve_http
from hypha.telemetry.http.hosts import foreign_host
from hypha.telemetry.http.server import KEEP_ALIVE_S


def report(healthy: bool) -> HealthReport:
    return HealthReport(healthy=healthy, component="hypha-worker", version="1", peer="12D3", uptime_s=2.5)


STATUS = {"status": lambda: Resources(cpu=2.0)}


async def test_health_and_status() -> None:
    healthy = True
    async with trio.open_nursery() as nursery:
        address = await nursery.start(
            partial(serve_http, "127.0.0.1:0", lambda: report(healthy), lookups=STATUS)
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


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0"])
async def test_a_name_of_another_site_that_points_here_gets_no_answer(address: str) -> None:
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(partial(serve_http, address, lambda: report(True), lookups=STATUS))
        reached = bound.replace("0.0.0.0", "127.0.0.1")
        async with httpx.AsyncClient(base_url=f"http://{reached}", trust_env=False) as client:
            for path in ("/health", "/status", "/nowhere"):
                for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil"):
                    answer = await client.get(path, headers={"host": host})
                    assert (answer.status_code, "no address of this machine" in answer.text) == (403, True)
            for host in ("localhost", "127.0.0.1:1", "[::1]:9", reached):
                assert (await client.get("/health", headers={"host": host})).status_code == 200
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("server", "foreign"), [(("127.0.0.1", 1), True), (("192.0.2.7", 1), False)])
def test_over_another_interface_a_machine_has_the_name_that_its_operator_gives_it(
    server: tuple[str, int], foreign: bool
) -> None:
    scope = {"type": "http", "server": server, "headers": [(b"host", b"worker-1:9103")]}
    assert (foreign_host(scope) is not None) is foreign
    # as where the name of a machine leads to 127.0.1.1, and http_address has it
    assert foreign_host(scope, "worker-1") is None


async def test_without_a_status_there_is_none() -> None:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
            assert (await client.get("/status")).status_code == 404
        nursery.cancel_scope.cancel()


async def test_an_address_in_use_may_pass() -> None:
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressTaken, match=f"http_address: cannot listen on {address}: Address already"):
            await serve_http(address, lambda: report(True))
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:no") as raised:
        await serve_http("127.0.0.1:no", lambda: report(True))
    assert raised.value.exit_code == 2


async def test_it_ends_at_once_with_a_client_connected() -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
            async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
                await client.get("/health")
                ending = Stopwatch()
                nursery.cancel_scope.cancel()
    assert ending.elapsed_s() < 3


async def open_to(address: str) -> trio.SocketStream:
    host, _, port = address.rpartition(":")
    return await trio.open_tcp_stream(host, int(port))


async def gone(stream: trio.SocketStream) -> bool:
    """Whether the other side has closed it."""
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass
    return True


async def test_who_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypha.telemetry.http.hypercorn.BoundedConfig.write_timeout_s", 0.3, raising=False)

    asked = trio.Event()

    async def much(_: Request) -> Response:
        asked.set()
        return Response(b"x" * (32 << 20))

    async with trio.open_nursery() as nursery:
        address = await nursery.start(
            partial(serve_http, "127.0.0.1:0", lambda: report(True), routes=[Route("/much", much)])
        )
        before = trio.lowlevel.current_statistics().tasks_living
        async with await open_to(address) as stream:
            await stream.send_all(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asked.wait()
            await until(lambda: trio.lowlevel.current_statistics().tasks_living == before)
        # who reads has all of it, in the time that a busy machine takes
        monkeypatch.setattr("hypha.telemetry.http.hypercorn.BoundedConfig.write_timeout_s", 60.0)
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
            assert len((await client.get("/much")).content) == 32 << 20
        nursery.cancel_scope.cancel()


async def test_so_many_connections_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hypha.telemetry.http.hypercorn.BoundedConfig.max_connections", 3, raising=False)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
        kept = [await open_to(address) for _ in range(3)]
        for stream in kept:
            await stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        for _ in range(2):
            began = Stopwatch()
            with trio.fail_after(20):
                async with await open_to(address) as refused:
                    assert await gone(refused)
            assert began.elapsed_s() < 2
        assert [one.getMessage() for one in caplog.records] == [
            "Local HTTP has 3 connections, and refuses more."
        ]
        for stream in kept:
            await stream.aclose()

        async def well() -> bool:
            async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as client:
                try:
                    return (await client.get("/health")).status_code == 200
                except httpx.TransportError:
                    return False

        with trio.fail_after(20):
            while not await well():
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()


def test_idle_connections_are_kept_longer_than_clients_use_them_again() -> None:
    """Both let go after five seconds once: a request every five seconds met the end of its connection."""
    expiry = httpx.Limits().keepalive_expiry
    assert expiry is not None
    assert expiry + 5 < KEEP_ALIVE_S


async def test_http_2_is_not_spoken() -> None:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
        async with await open_to(address) as stream:
            await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            began = Stopwatch()
            with trio.fail_after(20):
                assert await gone(stream)
            assert began.elapsed_s() < 2
        async with await open_to(address) as stream:
            await stream.send_all(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
                b"Upgrade: h2c\r\nHTTP2-Settings: AAQAAAAA\r\n\r\n"
            )
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()


async def test_a_client_that_has_left_leaves_nothing() -> None:
    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", lambda: report(True))
        host, _, port = address.rpartition(":")
        before = trio.lowlevel.current_statistics().tasks_living
        for request in (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /he", b""):
            stream = await trio.open_tcp_stream(host, int(port))
            await stream.send_all(request)
            if request.endswith(b"\r\n\r\n"):
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
            await stream.aclose()
        began = Stopwatch()
        await until(lambda: trio.lowlevel.current_statistics().tasks_living == before)
        # a connection that nobody uses any more lives longer
        assert began.elapsed_s() < 4
        nursery.cancel_scope.cancel()


async def test_look_ups_are_for_this_machine_alone() -> None:
    looks = {"leases": lambda: Resources(cpu=3.0)}
    async with trio.open_nursery() as nursery, httpx.AsyncClient(trust_env=False) as client:
        local = partial(serve_http, "127.0.0.1:0", lambda: report(True), lookups=looks)
        address = await nursery.start(local)
        assert (await client.get(f"http://{address}/leases")).json() == {"cpu": 3.0}
        assert (await client.get(f"http://{address}/peers")).status_code == 404
        anywhere = partial(serve_http, "0.0.0.0:0", lambda: report(True), lookups=looks)
        port = (await nursery.start(anywhere)).rpartition(":")[2]
        refused = await client.get(f"http://127.0.0.1:{port}/leases")
        assert (refused.status_code, refused.text) == (403, "This is told on a loopback address only.\n")
        nursery.cancel_scope.cancel()

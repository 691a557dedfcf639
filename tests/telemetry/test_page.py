"""The live page as viewers and strangers meet it: what is streamed, to whom, and what a slow one costs."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
from tests.support.polling import until
from tests.support.stopwatch import Stopwatch

from hypha.messages import HealthReport, Resources
from hypha.telemetry import serve_http
from hypha.telemetry.http.hosts import is_loopback
from hypha.telemetry.page import ASSETS, Message, Next, PageFeed, page_routes, token_in, worker_routes

TOKEN = "a-token-that-nobody-guesses"


class Story:
    """Says ``said``, then counts; each viewer from the beginning."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.told = 0

    def begin(self) -> partial[list[Message]]:
        return partial(self.news, iter(range(10**9)))

    def news(self, count: Iterable[int]) -> list[Message]:
        self.told += 1
        number = next(iter(count))
        first = [("past", {"rounds": []})] if number == 0 else []
        return [*first, ("now", {"number": number, "text": "x" * self.size})]


def paced(begin: Callable[[], Next], **pace: float) -> PageFeed:
    """A feed with other intervals and bounds."""
    feed = PageFeed(begin)
    vars(feed).update(pace)
    return feed


def health() -> HealthReport:
    return HealthReport(healthy=True, component="hypha-scheduler", version="1", peer="p", uptime_s=1.0)


@asynccontextmanager
async def serving(feed: PageFeed, token: str | None = None) -> AsyncIterator[str]:
    routes = page_routes(feed, lambda: Resources(cpu=2.0), token)
    async with trio.open_nursery() as nursery:
        yield await nursery.start(partial(serve_http, "127.0.0.1:0", health, routes=routes))
        nursery.cancel_scope.cancel()


def client(address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=30.0)


async def open_events(address: str, query: str = "") -> trio.SocketStream:
    """A viewer's connection; of HTTP 1.0, so that what comes is as it was written."""
    host, port = address.split(":")
    stream = await trio.open_tcp_stream(host, int(port))
    await stream.send_all(f"GET /events{query} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    return stream


async def read(address: str, count: int, query: str = "") -> list[tuple[str, dict[str, object]]]:
    """The first ``count`` events, or all up to ``end``."""
    found: list[tuple[str, dict[str, object]]] = []
    with trio.fail_after(20):
        async with await open_events(address, query) as stream:
            got = b""
            while b"\r\n\r\n" not in got:
                got += await stream.receive_some()
            head, _, got = got.partition(b"\r\n\r\n")
            assert b" 200 " in head.splitlines()[0]
            assert b"content-type: text/event-stream" in head.lower()
            while len(found) < count and not (found and found[-1][0] == "end"):
                more = await stream.receive_some()
                assert more, "the stream ended by itself"
                *events, got = (got + more).split(b"\n\n")
                for event in events:
                    if event.startswith(b"event: "):
                        name, _, data = event.partition(b"\n")
                        found.append((name[7:].decode(), json.loads(data[6:])))
    return found[:count]


async def test_a_viewer_is_told_the_past_and_then_what_is_new() -> None:
    async with serving(paced(Story().begin, interval_s=0.01)) as address:
        events = await read(address, 4)
    assert [name for name, _ in events] == ["past", "now", "now", "now"]
    assert [event["number"] for _, event in events[1:]] == [0, 1, 2]


async def test_everybody_is_told_the_end() -> None:
    feed = paced(Story().begin, interval_s=60.0)
    found: list[list[tuple[str, dict[str, object]]]] = []
    async with serving(feed) as address, trio.open_nursery() as nursery:

        async def look() -> None:
            found.append(await read(address, 100))

        nursery.start_soon(look)
        nursery.start_soon(look)
        await until(lambda: feed.viewers == 2)
        await feed.finish(2.0)
        assert feed.viewers == 0
    # the last news come before the end, whatever the interval
    for events in found:
        # on a busy machine the first news may be the last
        assert [name for name, _ in events] in (["past", "now", "end"], ["past", "now", "now", "end"])
    assert len(found) == 2


async def test_viewers_are_bounded_and_one_that_leaves_makes_room() -> None:
    feed = paced(Story().begin, interval_s=0.01, max_viewers=2)
    async with serving(feed) as address, client(address) as http:
        async with await open_events(address), await open_events(address):
            await until(lambda: feed.viewers == 2)
            refused = await http.get("/events")
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        await until(lambda: feed.viewers == 0)
        assert len(await read(address, 2)) == 2


async def test_one_that_does_not_read_is_dropped_and_holds_up_nobody() -> None:
    story = Story(size=200_000)
    feed = paced(story.begin, interval_s=0.001, slow_s=0.3)
    async with serving(feed) as address:
        async with await open_events(address):
            await until(lambda: feed.viewers == 1)
            with trio.fail_after(20):
                # as the connection takes no more, nothing is said to it: no queue grows
                while True:
                    told = story.told
                    await trio.sleep(0.1)
                    if story.told == told:
                        break
                assert [name for name, _ in await read(address, 3)] == ["past", "now", "now"]
            await until(lambda: feed.viewers == 0)


async def test_the_node_ends_at_once_while_one_does_not_read() -> None:
    feed = paced(Story(size=200_000).begin, interval_s=0.001, slow_s=60.0)
    with trio.fail_after(20):
        async with serving(feed) as address:
            stalled = await open_events(address)
            await until(lambda: feed.viewers == 1)
            await trio.sleep(0.3)
            ending = Stopwatch()
    await stalled.aclose()
    assert ending.elapsed_s() < 3.0


async def test_nothing_of_the_page_comes_from_elsewhere() -> None:
    async with serving(PageFeed(Story().begin)) as address, client(address) as http:
        page = await http.get("/")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["referrer-policy"] == "no-referrer"
        named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
        assert named
        for name in named:
            assert name.startswith("/assets/"), name
            assert (await http.get(name)).status_code == 200
        # neither inline scripts, nor styles, nor handlers: the policy would block them
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page.text)
        for path in ("/assets/../page.py", "/assets/%2e%2e/routes.py", "/assets/nothing.js"):
            assert (await http.get(path)).status_code == 404


async def test_the_page_of_a_worker_has_all_that_it_names_and_nothing_of_the_worker_in_it() -> None:
    asked = {"leases": lambda: Resources(cpu=2.0)}
    async with trio.open_nursery() as nursery:
        serve = partial(serve_http, "127.0.0.1:0", health, routes=worker_routes(), lookups=asked)
        address = await nursery.start(serve)
        async with client(address) as http:
            page = await http.get("/")
            assert page.headers["content-security-policy"].startswith("default-src 'self';")
            assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page.text)
            script = (await http.get("/assets/worker.js")).text
            named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
            named |= set(re.findall(r'from "([^"]+)"', script)) | set(re.findall(r'ask\("([^"]+)"\)', script))
            assert {"/assets/text.js", "/leases", "/health"} < named
            for name in named:
                assert (await http.get(name)).status_code == 200, name
            for name in re.findall(r'get\("([a-z-]+)"\)', script):
                assert f'id="{name}"' in page.text, name
            assert (await http.get("/assets/page.js")).status_code == 404
        nursery.cancel_scope.cancel()


def test_what_peers_say_never_becomes_markup() -> None:
    for path in ASSETS.glob("*.js"):
        if not path.name.startswith("uPlot"):
            code = path.read_text()
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", code), (
                path
            )


async def test_with_a_token_nobody_else_reads() -> None:
    feed = paced(Story().begin, interval_s=0.01)
    async with serving(feed, TOKEN) as address, client(address) as http:
        for path in ("/status", "/events", "/status?token=other", "/status?token=", f"/status?x={TOKEN}"):
            refused = await http.get(path)
            assert refused.status_code == 401, path
            assert refused.headers["www-authenticate"] == "Bearer"
            assert TOKEN not in refused.text
        wrong = await http.get("/status", headers={"authorization": "Bearer other"})
        assert wrong.status_code == 401
        assert (await http.get("/health")).status_code == 200
        assert (await http.get(f"/status?token={TOKEN}")).json() == {"cpu": 2.0}
        bearer = await http.get("/status", headers={"authorization": f"Bearer {TOKEN}"})
        assert bearer.json() == {"cpu": 2.0}
        assert len(await read(address, 2, f"?token={TOKEN}")) == 2


async def test_another_sites_name_for_this_machine_is_refused() -> None:
    async with serving(PageFeed(Story().begin)) as address, client(address) as http:
        for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:9", 200), (address, 200)):
            answer = await http.get("/status", headers={"host": host})
            assert answer.status_code == status, host


async def test_nothing_can_be_changed() -> None:
    async with serving(PageFeed(Story().begin)) as address, client(address) as http:
        for path in ("/", "/status", "/events", "/assets/page.js"):
            assert (await http.post(path)).status_code == 405, path


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
    ],
)
def test_which_addresses_need_a_token(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_the_token_is_made_once_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    token, path = token_in(tmp_path / "state" / "job")
    assert len(token) >= 40
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert token_in(tmp_path / "state" / "job") == (token, path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("")
    again, _ = token_in(tmp_path / "state" / "job")
    assert again not in ("", token)
    routes = page_routes(PageFeed(Story().begin), lambda: None, token)
    assert token not in repr([(one, one.app) for one in routes])

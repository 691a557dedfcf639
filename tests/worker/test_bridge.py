"""The bridge over a real socket, by httpx, by the standard library and by curl."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
import trio
import trio.testing
from openapi_spec_validator import validate
from tests.support.polling import until
from tests.worker.test_process import TOKEN, train_job

from hypha.errors import PeerUnreachable, Refused
from hypha.messages import (
    MAX_EVENT_BYTES,
    Delivery,
    Directive,
    Event,
    ExecutorExited,
    FetchCall,
    FetchedFile,
    FinishedSpan,
    HuggingFace,
    Job,
    Loaded,
    Local,
    Members,
    PeerRef,
    Peers,
    Plan,
    ReceivedFile,
    Reference,
    SchedulerData,
    SendCall,
    SendModel,
    Sent,
    SpansCall,
    StatusCall,
    TransferMeta,
    Uri,
)
from hypha.tracing import traceparent
from hypha.worker.bridge.feeds import (
    MAX_NEWEST,
    MAX_WAITING,
    MAX_WAITING_BYTES,
    Directives,
    Feed,
    FileArrivals,
)
from hypha.worker.bridge.server import (
    MAX_BODY_BYTES,
    MAX_CALLS,
    MAX_CONNECTIONS,
    MAX_STREAMS,
    bind_bridge,
    serve_bridge,
)
from hypha.worker.bridge.spans import ExecutorSpans
from hypha.worker.jobs.deliveries import settled
from hypha.worker.jobs.directory import JobDirectory


class FileHandlers:
    """A desk whose only network is this directory: what the bridge asks comes and goes as told."""

    def __init__(self, directory: JobDirectory) -> None:
        self.directory = directory
        self.directives = Directives()
        self.arrivals = FileArrivals(directory.path)
        self.events: list[Event] = []
        self.outcomes: tuple[Delivery, ...] = ()
        self.slices = Feed[FetchedFile]()
        self.fetching = 0
        self.exported: list[FinishedSpan] = []
        self.spans = ExecutorSpans(self.exported.extend, "job-1")
        self.full = False
        #: the trace in which each event and span was taken
        self.traces: list[str | None] = []

    @property
    def job(self) -> Job:
        return train_job()

    async def fetch(self, resource: Reference) -> list[FetchedFile]:
        match resource:
            case SchedulerData():
                self.fetching += 1
                try:
                    return [await self.slices.get()]
                finally:
                    self.fetching -= 1
            case Uri():
                raise Refused("not-allowed", "no")
            case HuggingFace():
                raise PeerUnreachable("hub", "down")
            case Peers():
                raise Refused("busy", "later", peer="somebody")
        raise RuntimeError("a bug")

    async def send(self, call: SendCall) -> Sent:
        async with self.directory.pinned(call.path):
            pass
        return settled(self.outcomes)

    def report(self, event: Event) -> None:
        if self.full:
            raise Refused("busy", "too many events wait")
        self.events.append(event)
        self.traces.append(traceparent())


@asynccontextmanager
async def bridge(tmp_path: Path) -> AsyncIterator[tuple[FileHandlers, httpx.AsyncClient]]:
    directory = JobDirectory.create(tmp_path)
    handlers = FileHandlers(directory)
    transport = httpx.AsyncHTTPTransport(uds=str(directory.socket_path))
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_bridge, handlers, bind_bridge(directory.socket_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://bridge", timeout=30) as client:
            yield handlers, client
        nursery.cancel_scope.cancel()
    directory.remove()


async def post(client: httpx.AsyncClient, path: str, call: msgspec.Struct) -> httpx.Response:
    return await client.post(path, content=msgspec.json.encode(call))


async def test_job_comes_with_its_secrets_through_a_private_socket(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, client):
        mode = handlers.directory.socket_path.stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        answer = await client.get("/job")
        assert TOKEN in answer.text
        assert msgspec.json.decode(answer.content, type=Job) == handlers.job


async def test_openapi_is_valid_and_names_every_endpoint(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (_, client):
        document = (await client.get("/openapi.json")).json()
        validate(document)
        assert set(document["paths"]) == {
            "/job", "/directives", "/resources/fetch", "/resources/send", "/resources/receive",
            "/status/send", "/spans",
        }  # fmt: skip
        assert {"TrainJob", "SendCall", "BridgeError", "Plan"} <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    ("resource", "status", "error"),
    [
        (Uri(value="http://x"), 403, "not-allowed"),
        (HuggingFace(repository="a/b"), 502, "unreachable"),
        (Peers(peers=()), 409, "busy"),
        (Local(url="/x"), 500, "internal"),
    ],
)
async def test_fetch_errors(
    tmp_path: Path, resource: Reference, status: int, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with bridge(tmp_path) as (_, client):
        answer = await post(client, "/resources/fetch", FetchCall(resource=resource))
        assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert answer.json()["detail"]


EXITED = ExecutorExited(exit_code=0, tail="")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/resources/fetch", b"{", 400),
        ("POST", "/resources/fetch", b'{"resource": {"type": "floppy"}}', 400),
        ("POST", "/status/send", msgspec.json.encode(StatusCall(event=EXITED)), 400),
        ("POST", "/status/send", b" " * (MAX_BODY_BYTES + 1), 413),
        ("POST", "/status/send", b" " * (MAX_EVENT_BYTES + 1), 413),
        ("GET", "/nothing", b"", 404),
        ("GET", "/resources/fetch", b"", 405),
    ],
)  # fmt: skip
async def test_wrong_calls(tmp_path: Path, method: str, path: str, body: bytes, status: int) -> None:
    async with bridge(tmp_path) as (handlers, client):
        answer = await client.request(method, path, content=body)
        assert answer.status_code == status
        assert set(answer.json()) == {"error", "detail"}
        assert handlers.events == []


async def test_send_tells_what_became_of_each_receiver(tmp_path: Path) -> None:
    ok = Delivery(peer="a", acknowledged=True)
    refused = Delivery(peer="b", acknowledged=False, error="stale", detail="too late")
    away = Delivery(peer="c", acknowledged=False, error="unreachable", detail="gone")
    async with bridge(tmp_path) as (handlers, client):
        (handlers.directory.path / "outgoing/x").write_text("x")
        call = SendCall(resource=Peers(peers=(PeerRef(peer="a"),)), path="outgoing/x", round=0)
        for outcomes, status, error in [
            ((ok, refused, away), 200, None),
            ((away, refused), 409, "stale"),
            ((away,), 502, "unreachable"),
        ]:
            handlers.outcomes = outcomes
            answer = await post(client, "/resources/send", call)
            assert answer.status_code == status
            if error is None:
                assert msgspec.json.decode(answer.content, type=Sent).deliveries == outcomes
            else:
                assert answer.json()["error"] == error


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../outside", 400), ("/etc/passwd", 400), ("link", 400), ("linked-dir/outside", 400), ("", 400),
        ("outgoing", 400), ("outgoing/../../outside", 400), ("nothing", 404),
        ("in\0side", 400), ("loop", 400),
    ],
)  # fmt: skip
async def test_paths_cannot_leave_the_job_directory(tmp_path: Path, path: str, status: int) -> None:
    async with bridge(tmp_path) as (handlers, client):
        (tmp_path / "outside").write_text("secret")
        (handlers.directory.path / "link").symlink_to(tmp_path / "outside")
        (handlers.directory.path / "linked-dir").symlink_to(tmp_path)
        (handlers.directory.path / "loop").symlink_to(handlers.directory.path / "loop")
        handlers.outcomes = (Delivery(peer="a", acknowledged=True),)
        call = SendCall(resource=Peers(peers=(PeerRef(peer="a"),)), path=path, round=0)
        answer = await post(client, "/resources/send", call)
        assert answer.status_code == status


class Stream:
    """An event stream, read off the socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._rest = b""

    async def data(self, count: int) -> list[bytes]:
        found: list[bytes] = []
        with trio.fail_after(20):
            while len(found) < count:
                *lines, self._rest = self._rest.split(b"\n")
                found += [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
                if len(found) < count:
                    self._rest += await self._stream.receive_some()
        assert len(found) == count
        return found

    async def ends(self) -> None:
        """Read to the end of the response, which is chunked."""
        with trio.fail_after(5):
            while not self._rest.endswith(b"0\r\n\r\n"):
                received = await self._stream.receive_some()
                assert received
                self._rest += received


@asynccontextmanager
async def stream(handlers: FileHandlers, method: str, path: str, body: bytes = b"") -> AsyncIterator[Stream]:
    async with await trio.open_unix_socket(handlers.directory.socket_path) as connection:
        head = f"{method} {path} HTTP/1.1\r\nhost: b\r\ncontent-length: {len(body)}\r\n\r\n"
        await connection.send_all(head.encode() + body)
        yield Stream(connection)


async def test_directives_start_with_the_newest_of_each(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, _):
        a, b = PeerRef(peer="a"), PeerRef(peer="b")
        assert handlers.directives.put(1, Plan(round=1))
        assert handlers.directives.put(2, SendModel(to=a))
        assert handlers.directives.put(3, SendModel(to=b))
        assert handlers.directives.put(4, Plan(round=1, batches=7))
        assert not handlers.directives.put(4, Plan(round=1, batches=8))
        assert not handlers.directives.put(1, Plan(round=0))
        newest: list[Directive] = [SendModel(to=a), SendModel(to=b), Plan(round=1, batches=7)]
        for seq in (5, 6):  # again after a reconnect
            async with stream(handlers, "GET", "/directives") as opened:
                texts = await opened.data(len(newest))
                assert [msgspec.json.decode(text, type=Directive) for text in texts] == newest
                members = Members(peers=(PeerRef(peer=f"peer-{seq}"),))
                handlers.directives.put(seq, members)
                (text,) = await opened.data(1)
                assert msgspec.json.decode(text, type=Directive) == members
            newest = [*newest[:3], members]


def received(handlers: FileHandlers, name: str, kind: str = "theta") -> ReceivedFile:
    (handlers.directory.part("incoming") / name).write_bytes(b"x")
    meta = TransferMeta(kind=kind, name=name, size=1, blake3="0" * 64)
    return ReceivedFile(path=f"incoming/{name}", size=1, from_peer="ps", meta=meta)


async def test_files_wait_for_their_executor_until_it_deletes_them(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, _):
        early, other = received(handlers, "early"), received(handlers, "other", "update")
        handlers.arrivals.put(early)
        handlers.arrivals.put(other)
        call = b'{"kinds": ["theta"]}'
        async with stream(handlers, "POST", "/resources/receive", call) as opened:
            assert [msgspec.json.decode(text, type=ReceivedFile) for text in await opened.data(1)] == [early]
            late = received(handlers, "late")
            handlers.arrivals.put(late)
            assert [msgspec.json.decode(text, type=ReceivedFile) for text in await opened.data(1)] == [late]
        (handlers.directory.path / early.path).unlink()
        async with stream(handlers, "POST", "/resources/receive", call) as opened:
            assert [msgspec.json.decode(text, type=ReceivedFile) for text in await opened.data(1)] == [late]


async def test_client_that_goes_away_takes_no_slice(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, client):
        call = FetchCall(resource=SchedulerData(peer="scheduler", dataset="digits"))
        with trio.move_on_after(0.2):
            await post(client, "/resources/fetch", call)
        with trio.fail_after(20):
            while handlers.fetching:
                await trio.sleep(0.01)
        slice_ = FetchedFile(path="slices/1", size=1)
        handlers.slices.put(slice_)
        answer = await post(client, "/resources/fetch", call)
        assert msgspec.json.decode(answer.content, type=list[FetchedFile]) == [slice_]


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("bridge")
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


async def test_plain_standard_library_client(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, _):

        def talk() -> tuple[int, object]:
            connection = UnixConnection(handlers.directory.socket_path)
            body = json.dumps({"event": {"type": "loaded", "incarnation": "i"}})
            try:
                connection.request("POST", "/status/send", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read())
            finally:
                connection.close()

        assert await trio.to_thread.run_sync(talk) == (200, {})
        assert handlers.events == [Loaded(incarnation="i")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
async def test_curl(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, _):
        handlers.directives.put(1, Plan(round=3, batches=4))
        socket_path = str(handlers.directory.socket_path)
        done = await trio.run_process(
            ["curl", "-sN", "--max-time", "1", "--unix-socket", socket_path, "http://b/directives"],
            capture_stdout=True,
            check=False,
            stderr=subprocess.DEVNULL,
        )
        assert b'event: plan\ndata: {"type":"plan","round":3,"batches":4}\n\n' in done.stdout


async def test_clients_that_left_leave_nothing(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, client):
        await client.get("/job")
        before = trio.lowlevel.current_statistics().tasks_living

        for path, end in ((b"/openapi.json", b"}"), (b"/directives", b": open\n\n\r\n")):
            for _ in range(3):
                stream = await trio.open_unix_socket(handlers.directory.socket_path)
                await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nHost: bridge\r\n\r\n")
                answer = b""
                while not answer.endswith(end):
                    answer += await stream.receive_some()
                await trio.testing.wait_all_tasks_blocked()
                await stream.aclose()
        # connections are kept for their clients for a day
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= before)


async def test_bridge_ends_with_streams_open(tmp_path: Path) -> None:
    with trio.fail_after(20):
        async with bridge(tmp_path) as (handlers, _):
            connection = await trio.open_unix_socket(handlers.directory.socket_path)
            await connection.send_all(b"GET /directives HTTP/1.1\r\nhost: b\r\n\r\n")
            assert await connection.receive_some()
        while await connection.receive_some():
            pass
        await connection.aclose()


async def test_a_call_is_carried_out_in_the_callers_span_and_spans_are_taken(tmp_path: Path) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    said = msgspec.json.encode(StatusCall(event=Loaded(incarnation="i")))
    async with bridge(tmp_path) as (handlers, client):
        for headers in ({}, {"traceparent": parent}, {"traceparent": "garbage"}):
            await client.post("/status/send", content=said, headers=headers)
        assert handlers.traces == [None, parent, None]
        span = FinishedSpan(name="Train", trace_id="a" * 32, span_id="b" * 16, start_ns=1, end_ns=2)
        assert (await post(client, "/spans", SpansCall(spans=(span,)))).status_code == 200
        assert handlers.exported == [msgspec.structs.replace(span, attributes={"hypha.job": "job-1"})]
        answer = await client.post("/spans", content=b'{"spans": [{}]}')
        assert (answer.status_code, answer.json()["error"]) == (400, "malformed")


UPGRADE = (
    b"GET /job HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize("data", [UPGRADE + b"\x81\x85abcde", UPGRADE * 2])
async def test_a_connection_that_fails_ends_alone(data: bytes, tmp_path: Path) -> None:
    """As shipped, the server ends with it, and so did the worker."""
    async with bridge(tmp_path) as (handlers, client):
        for _ in range(2):
            async with await trio.open_unix_socket(str(handlers.directory.socket_path)) as stream:
                with trio.move_on_after(1.0), contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(data)
                    while await stream.receive_some():
                        pass
        assert (await client.get("/job")).status_code == 200


async def test_calls_beyond_the_limit_are_told_to_come_again(tmp_path: Path) -> None:
    """An executor that calls without end takes so much of its worker, and may go on later."""
    async with bridge(tmp_path) as (handlers, client), AsyncExitStack() as stack:
        body = msgspec.json.encode(FetchCall(resource=SchedulerData(peer="s", dataset="d")))
        for _ in range(MAX_CALLS):
            await stack.enter_async_context(stream(handlers, "POST", "/resources/fetch", body))
        await until(lambda: handlers.fetching == MAX_CALLS)
        answer = await client.get("/job")
        assert (answer.status_code, answer.json()["error"]) == (503, "busy")
        handlers.slices.put(FetchedFile(path="a", size=1))
        await until(lambda: handlers.fetching == MAX_CALLS - 1)
        assert (await client.get("/job")).status_code == 200
    assert handlers.fetching == 0


async def test_streams_and_connections_are_bounded(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, client), AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(stream(handlers, "GET", "/directives"))
            for _ in range(MAX_STREAMS)
        ]
        handlers.directives.put(1, Plan(round=1))
        for one in streams:
            assert await one.data(1)
        answer = await client.get("/directives")
        assert (answer.status_code, answer.json()["error"]) == (503, "busy")
        silent = [
            await stack.enter_async_context(await trio.open_unix_socket(handlers.directory.socket_path))
            for _ in range(MAX_CONNECTIONS)
        ]
        with trio.fail_after(5):
            assert await silent[-1].receive_some() == b""
        assert (await client.get("/job")).status_code == 200


async def test_events_that_the_worker_has_no_room_for_may_be_said_again(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, client):
        call = StatusCall(event=Loaded(incarnation="x"))
        handlers.full = True
        assert (await post(client, "/status/send", call)).status_code == 503
        handlers.full = False
        assert (await post(client, "/status/send", call)).status_code == 200
        assert handlers.events == [call.event]


async def test_a_stream_that_nobody_reads_ends_and_may_be_opened_again() -> None:
    directives = Directives()
    with directives.open() as feed:
        for number in range(MAX_WAITING + 10):
            assert directives.put(number, Plan(round=number))
        with pytest.raises(trio.EndOfChannel):
            await feed.get()
    with directives.open() as feed:
        assert await feed.get() == Plan(round=MAX_WAITING + 9)
    for number in range(2 * MAX_NEWEST):
        directives.put(number, SendModel(to=PeerRef(peer=f"peer-{number}")))
    assert len(directives._newest) == MAX_NEWEST


async def test_what_waits_in_a_stream_is_bounded_in_bytes_too() -> None:
    large = Members(peers=tuple(PeerRef(peer=f"{number:0>64}") for number in range(10_000)))
    directives = Directives()
    with directives.open() as feed:
        for number in range(MAX_WAITING_BYTES // (64 * len(large.peers))):
            directives.put(number, large)
        with pytest.raises(trio.EndOfChannel):
            await feed.get()
    with directives.open() as feed:
        assert await feed.get() == large


async def test_a_client_hears_that_its_stream_was_ended(tmp_path: Path) -> None:
    async with bridge(tmp_path) as (handlers, _), stream(handlers, "GET", "/directives") as directives:
        handlers.directives.put(0, Plan(round=0))
        assert await directives.data(1)
        for number in range(1, MAX_WAITING + 10):
            handlers.directives.put(number, Plan(round=number))
        await directives.ends()

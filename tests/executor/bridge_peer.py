"""The other end of an executor's socket: a small HTTP server, made of the standard library alone, that says
what the bridge's contract says, and between several of them carries files as the bulk plane would.
"""

from __future__ import annotations

import os
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, TypeVar

import blake3
import msgspec
import xxhash
from tests.support.forked import ForkedExecutor

from hypha.messages import (
    BridgeError,
    Delivery,
    Directive,
    Event,
    FetchCall,
    FetchedFile,
    FinishedSpan,
    Job,
    JobStamp,
    Local,
    Peers,
    ReceiveCall,
    ReceivedFile,
    SchedulerData,
    SendCall,
    Sent,
    SliceAssigned,
    SpansCall,
    StatusCall,
    TransferMeta,
)

T = TypeVar("T")


class Network:
    """Bridges by PeerID, and what came to the scheduler: ``<kind>/<round>/<name>`` below ``scheduler``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bridges: dict[str, Bridge] = {}
        self.scheduler = directory / "scheduler"

    def add(self, job: Job, **resources: Path) -> Bridge:
        bridge = Bridge(self, job, resources)
        self.bridges[job.me] = bridge
        return bridge

    def close(self) -> None:
        for bridge in self.bridges.values():
            bridge.close()


class Bridge:
    """One executor with its bridge. ``resources`` are directories by the name of a ``Peers`` resource."""

    def __init__(self, network: Network, job: Job, resources: dict[str, Path]) -> None:
        self.network = network
        self.job = job
        self.resources = resources
        self.directory = network.directory / f"hypha-{job.me}"
        for part in ("incoming", "outgoing", "artifacts"):
            (self.directory / part).mkdir(parents=True)
        self.lock = threading.Condition()
        self.events: list[Event] = []
        self.directives: list[Directive] = []
        self.arrivals: list[ReceivedFile] = []
        self.slices: deque[tuple[SliceAssigned, Path, JobStamp]] = deque()
        #: kind -> answers to give to sends before any goes through
        self.refusals: dict[str, deque[tuple[int, str]]] = {}
        self.sent: list[SendCall] = []
        self.spans: list[FinishedSpan] = []
        #: the ``traceparent`` of each call, by path
        self.called_in: dict[str, list[str | None]] = {}
        self.closed = False
        self._files = 0
        handler = type("Handler", (_Handler,), {"bridge": self})
        self._server = _Server(str(self.directory / "bridge.sock"), handler)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        self.process: subprocess.Popen[bytes] | ForkedExecutor | None = None

    # --- the test's side ----------------------------------------------------------------------------

    def start(self, warm: bool = True, accelerate: Path | None = None) -> None:
        """Its executor, forked by the executor host unless ``warm`` is false; of several processes with
        accelerate's configuration file.
        """
        module = "training" if self.job.__class__.__name__ == "TrainJob" else "parameter_server"
        name, arguments = f"hypha.executor.{module}", [str(self.directory / "bridge.sock")]
        # a directive that was sent before a file is read by another thread: steps of a millisecond could be
        # over before it has had its turn
        environment = {"OMP_NUM_THREADS": "1", "HYPHA_STEP_S": "0.02"}
        if accelerate is not None:
            name, arguments, warm = "hypha.executor.launch", [str(accelerate), *arguments], False
        with (self.directory / "output").open("wb") as output:
            if warm:
                self.process = ForkedExecutor(name, arguments, self.directory, environment, output)
                return
            self.process = subprocess.Popen(
                [sys.executable, "-m", name, *arguments],
                cwd=self.directory,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def direct(self, directive: Directive) -> None:
        with self.lock:
            self.directives.append(directive)
            self.lock.notify_all()

    def wait(
        self, kind: type[T], where: Callable[[T], bool] = lambda event: True, timeout_s: float = 120
    ) -> T:
        """The first event of ``kind`` for which ``where`` holds."""
        deadline = time.monotonic() + timeout_s
        with self.lock:
            while True:
                for event in self.events:
                    if isinstance(event, kind) and (where is None or where(event)):
                        return event
                dead = self.process is not None and self.process.poll() is not None
                if dead or time.monotonic() > deadline:
                    raise AssertionError(f"no {kind.__name__}; {self.events}\n{self.output()}")
                self.lock.wait(0.1)

    def output(self) -> str:
        return (self.directory / "output").read_text()

    def exit_code(self, timeout_s: float = 60) -> int:
        assert self.process is not None
        return self.process.wait(timeout_s)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        self._server.shutdown()
        self._server.server_close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def deliver(self, kind: str, sender: str, source: Path, stamp: JobStamp, **fields: Any) -> ReceivedFile:
        """A file arrives, whole and verified."""
        with self.lock:
            self._files += 1
            path = f"incoming/{kind}-{self._files}"
        shutil.copyfile(source, self.directory / path)
        data = source.read_bytes()
        meta = TransferMeta(
            kind=kind,
            name=source.name,
            size=len(data),
            blake3=blake3.blake3(data).hexdigest(),
            xxh3=xxhash.xxh3_128(data).hexdigest(),
            stamp=stamp,
            **fields,
        )
        file = ReceivedFile(path=path, size=len(data), from_peer=sender, meta=meta)
        with self.lock:
            self.arrivals.append(file)
            self.lock.notify_all()
        return file

    # --- the executor's side --------------------------------------------------------------------------

    def fetch(self, call: FetchCall) -> list[FetchedFile]:
        if isinstance(call.resource, SchedulerData):
            with self.lock:
                self.lock.wait_for(lambda: bool(self.slices) or self.closed)
                if self.closed:
                    return []
                assigned, source, asked = self.slices.popleft()
                self._files += 1
                path = f"artifacts/slice-{self._files}"
            os.link(source, self.directory / path)
            size = source.stat().st_size
            return [
                FetchedFile(
                    path=path,
                    size=size,
                    slice=assigned,
                    round=asked.round,
                    attempt=asked.attempt,
                    generation=asked.generation,
                )
            ]
        assert isinstance(call.resource, Peers)
        assert call.resource.resource is not None
        source = self.resources[call.resource.resource]
        target = self.directory / "artifacts" / call.resource.resource
        shutil.copytree(source, target, dirs_exist_ok=True)
        return [
            FetchedFile(path=path.relative_to(self.directory).as_posix(), size=path.stat().st_size)
            for path in target.rglob("*")
        ]

    def send(self, call: SendCall) -> Sent:
        path = self.directory / call.path
        if isinstance(call.resource, Local):
            target = Path(call.resource.url)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
            return Sent(deliveries=(Delivery(peer="", acknowledged=True),))
        assert isinstance(call.resource, Peers)
        kind = call.resource.resource
        assert kind is not None
        with self.lock:
            self.sent.append(call)
        stamp = JobStamp(
            job_id=self.job.job_id,
            generation=self.job.generation if call.generation is None else call.generation,
            round=call.round,
            attempt=call.attempt,
        )
        deliveries = []
        for ref in call.resource.peers:
            if ref.peer == "scheduler":
                target = self.network.scheduler / kind / str(call.round) / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            elif ref.peer in self.network.bridges:
                self.network.bridges[ref.peer].deliver(
                    kind, self.job.me, path, stamp, samples=call.samples, contributors=call.contributors
                )
            else:
                deliveries.append(Delivery(peer=ref.peer, acknowledged=False, error="unreachable"))
                continue
            deliveries.append(Delivery(peer=ref.peer, acknowledged=True))
        return Sent(deliveries=tuple(deliveries))


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32


class _Handler(BaseHTTPRequestHandler):
    bridge: Bridge
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Tests have nothing to read."""

    def address_string(self) -> str:
        return "executor"

    def do_GET(self) -> None:
        if self.path == "/job":
            self._answer(200, self.bridge.job)
        else:
            self._stream(lambda: list(self.bridge.directives))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        bridge = self.bridge
        with bridge.lock:
            bridge.called_in.setdefault(self.path, []).append(self.headers.get("traceparent"))
        if self.path == "/spans":
            with bridge.lock:
                bridge.spans.extend(msgspec.json.decode(body, type=SpansCall).spans)
            self._answer(200, {})
        elif self.path == "/status/send":
            with bridge.lock:
                bridge.events.append(msgspec.json.decode(body, type=StatusCall).event)
                bridge.lock.notify_all()
            self._answer(200, {})
        elif self.path == "/resources/fetch":
            self._answer(200, bridge.fetch(msgspec.json.decode(body, type=FetchCall)))
        elif self.path == "/resources/send":
            call = msgspec.json.decode(body, type=SendCall)
            kind = call.resource.resource if isinstance(call.resource, Peers) else "local"
            waiting = bridge.refusals.get(kind or "")
            if waiting:
                status, code = waiting.popleft()
                self._answer(status, BridgeError(error=code, detail="as the test wants it"))
            else:
                self._answer(200, bridge.send(call))
        else:
            kinds = msgspec.json.decode(body, type=ReceiveCall).kinds
            self._stream(lambda: [file for file in bridge.arrivals if file.meta.kind in kinds])

    def _answer(self, status: int, value: object) -> None:
        data = msgspec.json.encode(value)
        try:
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the executor is gone
            self.close_connection = True

    def _stream(self, items: Callable[[], list[Any]]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(b": open\n\n")
        said = 0
        while True:
            with self.bridge.lock:
                while len(items()) == said and not self.bridge.closed:
                    self.bridge.lock.wait()
                fresh = items()[said:]
                if self.bridge.closed:
                    return
            for item in fresh:
                said += 1
                try:
                    self.wfile.write(b"event: x\ndata: " + msgspec.json.encode(item) + b"\n\n")
                except OSError:
                    return

"""The executor's end of the bridge: HTTP over the worker's Unix socket, from threads, never in a step's way.

Calls block their own thread; streams (directives, received files) and the reporting of events run in daemon
threads. Events are delivered in order and repeated until the worker has them; only a ``Progress`` that a
newer one follows is skipped.

The HTTP is the standard library's: a request costs the thread that makes it a tenth of a millisecond, a fifth
of what fuller clients take. It is taken from the training, which waits for the same interpreter.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from opentelemetry.trace import SpanKind

from hypha.backoff import NO_JITTER, Backoff
from hypha.decoding import decode, decode_json
from hypha.errors import HyphaError, PeerUnreachable, Refused, Undecodable
from hypha.executor.threads import Threads, finish
from hypha.messages import (
    Alive,
    BridgeError,
    Directive,
    Event,
    FetchCall,
    FetchedFile,
    FinishedSpan,
    Job,
    Progress,
    ReceiveCall,
    ReceivedFile,
    Reference,
    SendCall,
    Sent,
    SpansCall,
    StatusCall,
    encode_json,
)
from hypha.tracing import span, traceparent
from hypha.tracing.operations import BRIDGE

logger = logging.getLogger("hypha.executor")

#: At most this often a ``Progress`` crosses the bridge: each takes time of the trainer's interpreter.
PROGRESS_INTERVAL_S = 0.05
#: So often whoever waits says that it is well.
ALIVE_S = 1.0
#: The worker is the executor's parent, on the same machine: silent for so long, it is gone.
BRIDGE_LOST_S = 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.05, 2.0
_FAILURES = (OSError, http.client.HTTPException)
_CONNECT_TIMEOUT_S = 5.0
_HEADERS = {"content-type": "application/json"}

T = TypeVar("T")

_DIRECTIVE: msgspec.json.Decoder[Directive] = msgspec.json.Decoder(Directive)
_JOB: msgspec.json.Decoder[Job] = msgspec.json.Decoder(Job)
_RECEIVED = msgspec.json.Decoder(ReceivedFile)


class BridgeUnanswered(HyphaError):
    """Nobody answers on the socket, or not to the end, or not in HTTP."""


class BridgeLost(HyphaError):
    """The worker does not answer any more."""


class BridgeClient:
    """One executor's connection to its worker. ``directory`` is the job directory: paths are relative to it.

    ``failed``, which its owner sets, is called once, from any thread, when the bridge is lost or a stream
    handler raised.
    """

    def __init__(self, socket: Path, directory: Path) -> None:
        self.directory = directory
        self.threads = Threads()
        self.failed: Callable[[Exception], None] = logger.error
        #: called after each event, in the thread that reports them
        self.after_event: Callable[[], None] = lambda: None
        self._socket = socket
        #: with the ``traceparent`` of the span in which each was reported
        self._events: deque[tuple[Event, str | None]] = deque()
        self._lock = threading.Condition()
        self._reporting = False
        self._start("status", self._report_events)

    def _start(self, name: str, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=name, daemon=True).start()

    # --- calls --------------------------------------------------------------------------------------

    def job(self) -> Job:
        """What this executor is to do."""
        return decode(_JOB.decode, self._call("GET", "/job"))

    async def fetch(self, reference: Reference) -> list[tuple[Path, FetchedFile]]:
        """Have the worker fetch ``reference``; the files' absolute paths, and what was said about each.

        Blocks until they are there. Raises :class:`Refused` and :class:`PeerUnreachable`.
        """
        answer = self._call("POST", "/resources/fetch", FetchCall(resource=reference))
        files = decode_json(answer, list[FetchedFile])
        return [(self.directory / file.path, file) for file in files]

    async def send(self, call: SendCall) -> Sent:
        """Returns when it is decided for every receiver. Raises :class:`Refused` or, after the worker's own
        retries, :class:`PeerUnreachable` when nobody acknowledged.
        """
        return decode_json(self._call("POST", "/resources/send", call), Sent)

    def post_spans(self, spans: Sequence[FinishedSpan]) -> None:
        """Have the worker export ``spans``. Raises :class:`Refused`, :class:`PeerUnreachable` and, when the
        worker is gone, :class:`BridgeUnanswered`.
        """
        self._ask("POST", "/spans", SpansCall(spans=tuple(spans)), None)

    def relative(self, path: Path) -> str:
        """``path`` as the bridge wants it."""
        return path.relative_to(self.directory).as_posix()

    def _call(self, method: str, path: str, body: msgspec.Struct | None = None) -> bytes:
        attributes = {"http.request.method": method, "url.path": path}
        with span(BRIDGE, attributes, kind=SpanKind.CLIENT):
            return self._ask(method, path, body, traceparent())

    def _ask(self, method: str, path: str, body: msgspec.Struct | None, parent: str | None) -> bytes:
        # calls are few: events, which are many, have a connection of their own
        with contextlib.closing(BridgeConnection(self._socket)) as connection:
            return connection.ask(method, path, None if body is None else encode_json(body), parent)

    # --- streams ------------------------------------------------------------------------------------

    def directives(self, handler: Callable[[Directive], None]) -> None:
        """Call ``handler`` for each directive from now on, in a thread. The newest of each kind comes again
        after a reconnection.
        """
        self._start(
            "directives", lambda: self._follow("GET", "/directives", None, _DIRECTIVE.decode, handler)
        )

    def receive(self, kinds: tuple[str, ...], handler: Callable[[ReceivedFile], None]) -> None:
        """Call ``handler`` for each file of ``kinds`` that arrives, in a thread."""
        content = encode_json(ReceiveCall(kinds=kinds))
        self._start(
            "receive",
            lambda: self._follow("POST", "/resources/receive", content, _RECEIVED.decode, handler),
        )

    def _follow(
        self,
        method: str,
        path: str,
        content: bytes | None,
        decoder: Callable[[str], T],
        handler: Callable[[T], None],
    ) -> None:
        retry = _Retry()
        while True:
            try:
                with contextlib.closing(lines(self._socket, method, path, content)) as answer:
                    # server-sent events: WHATWG HTML, section 9.2
                    data: list[str] = []
                    for line in answer:
                        retry = _Retry()
                        if line.startswith("data:"):
                            data.append(line[5:].removeprefix(" "))
                        elif not line and data:
                            handler(decode(decoder, "\n".join(data)))
                            data = []
            except BridgeUnanswered as exc:
                logger.warning("The bridge's stream %s broke (%s); it is opened again.", path, exc)
            except Exception as exc:  # noqa: BLE001 - the thread's edge
                self.failed(exc)
                return
            if not retry.wait():
                self.failed(BridgeLost(f"the worker has not answered {path} for {BRIDGE_LOST_S:g} s"))
                return

    # --- events -------------------------------------------------------------------------------------

    def report(self, event: Event) -> None:
        """Have ``event`` delivered to the scheduler. Never blocks."""
        with self._lock:
            if isinstance(event, Progress) and self._events and isinstance(self._events[-1][0], Progress):
                self._events.pop()
            if isinstance(event, Alive) and self._events:
                return  # what waits to be said says so too
            reported_in = None if isinstance(event, Progress | Alive) else traceparent()
            self._events.append((event, reported_in))
            self._lock.notify()

    async def patiently(self, call: Coroutine[Any, Any, T]) -> T:
        """Do ``call`` in another thread, and have the worker know meanwhile that this one waits for it."""
        pool = ThreadPoolExecutor(1)
        # what it calls is below the span of whoever waits
        pending: Future[T] = pool.submit(copy_context().run, finish, call)
        pool.shutdown(wait=False)
        while not wait([pending], ALIVE_S).done:
            self.report(Alive())
        return pending.result()

    def flush(self, timeout_s: float) -> bool:
        """Wait until the worker has all events; False when it took longer."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._events and not self._reporting, timeout_s)

    def _report_events(self) -> None:
        quiet_until = 0.0
        connection = BridgeConnection(self._socket)
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._events))
                pause = quiet_until - time.monotonic()
                if pause > 0 and len(self._events) == 1 and isinstance(self._events[0][0], Progress):
                    # anything but another Progress is reported at once
                    self._lock.wait_for(lambda: not isinstance(self._events[-1][0], Progress), pause)
                event, reported_in = self._events.popleft()
                self._reporting = True
            delivered = self._deliver(connection, event, reported_in)
            if isinstance(event, Progress):
                quiet_until = time.monotonic() + PROGRESS_INTERVAL_S
            with self._lock:
                self._reporting = False
                self._lock.notify_all()
            if not delivered:
                return
            self.after_event()

    def _deliver(self, connection: BridgeConnection, event: Event, reported_in: str | None) -> bool:
        retry = _Retry()
        while True:
            try:
                connection.ask("POST", "/status/send", encode_json(StatusCall(event=event)), reported_in)
                return True
            except (BridgeUnanswered, PeerUnreachable) as exc:
                if isinstance(event, Progress | Alive):
                    return True
                logger.warning("The worker did not take a %s (%s); trying again.", type(event).__name__, exc)
                if not retry.wait():
                    self.failed(BridgeLost(f"the worker has taken no event for {BRIDGE_LOST_S:g} s"))
                    return False
            except Refused as exc:
                logger.error("The worker refused a %s: %s", type(event).__name__, exc)
                return True


class _Retry:
    """A backoff that gives up after :data:`BRIDGE_LOST_S`."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._backoff = Backoff(_FIRST_RETRY_S, _LAST_RETRY_S, jitter=NO_JITTER)

    def wait(self) -> bool:
        if time.monotonic() - self._started > BRIDGE_LOST_S:
            return False
        time.sleep(self._backoff.next_s())
        return True


class BridgeConnection(http.client.HTTPConnection):
    """To the socket at ``path``; for one thread. Once connected it waits for answers without a limit: a fetch
    waits for data, a send for slow peers, a stream for news.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("bridge")
        self._path = path

    def connect(self) -> None:
        """Called by the first request, and by the next one after ``close``."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT_TIMEOUT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(None)

    def ask(self, method: str, path: str, body: bytes | None, traceparent: str | None = None) -> bytes:
        """The body of the answer to one request, of the span that ``traceparent`` names; the connection may
        be used for another one. Raises :class:`BridgeUnanswered`, and :class:`Refused` or
        :class:`PeerUnreachable` where the status is not 200.
        """
        headers = _HEADERS if traceparent is None else {**_HEADERS, "traceparent": traceparent}
        try:
            self.request(method, path, body, headers)
            response = self.getresponse()
            content = response.read()
        except _FAILURES as exc:
            # the next request connects again
            self.close()
            raise _unanswered(exc) from exc
        if response.status != http.client.OK:
            raise _error(path, response.status, content)
        return content


def lines(socket_path: Path, method: str, path: str, body: bytes | None) -> Generator[str, None, None]:
    """The lines of a response that goes on for ever, without their ends, as they come. Raises as
    :meth:`BridgeConnection.ask`, :class:`BridgeUnanswered` also where they are cut off.
    """
    with contextlib.closing(BridgeConnection(socket_path)) as connection:
        try:
            connection.request(method, path, body, _HEADERS)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _error(path, response.status, response.read())
            # the response's own lines end without an error where it was cut between two chunks
            with io.TextIOWrapper(response, "utf-8", newline="\n") as text:
                while line := text.readline():
                    yield line.rstrip("\r\n")
        except _FAILURES as exc:
            raise _unanswered(exc) from exc


def _error(path: str, status: int, content: bytes) -> HyphaError:
    try:
        body = decode_json(content, BridgeError)
    except Undecodable:
        body = BridgeError(error="internal", detail=content.decode(errors="replace")[:500])
    if status >= 500:
        return PeerUnreachable("behind the bridge", f"{path}: {body.detail} ({body.error})")
    return Refused(body.error, body.detail)


def _unanswered(exc: Exception) -> BridgeUnanswered:
    return BridgeUnanswered(f"the worker does not answer: {exc or type(exc).__name__}")


def update_waits(refused: Refused) -> bool:
    """Whether an update that was refused is sent again: of a full disk, or of a parameter server that is not
    there yet or is being restored.
    """
    return refused.retryable or refused.code in ("no-space", "not-found")


def export_waits(refused: Refused) -> bool:
    """Whether a finished model that was refused is sent again: of a scheduler whose disk is full, or that has
    begun another generation of the job, which is not known here yet.
    """
    return refused.retryable or refused.code in ("no-space", "uninvited", "stale")

"""What components ask of the network: :class:`Node`, and what comes out of it.

:mod:`hypha.net` has the real one, over libp2p; :mod:`hypha.simulation` one in memory, under a virtual clock.
Scheduler, worker and data node know neither: they are given one of this shape. All methods are for one trio
thread; any call may be cancelled at any time. What goes wrong comes out as ``Refused``, ``PeerUnreachable``,
``RequestTimeout`` or ``TransferFailed``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import trio

from hypha.messages import PeerRef, PullFile, Report, Request, Response, TransferMeta, WorkerRequest

T = TypeVar("T")

#: (caller, what it offers) -> where the file goes; raises Refused
Gate = Callable[[str, TransferMeta], Awaitable[Path]]
#: (caller, what it is, where it lies): whole, verified and not acknowledged yet; may raise Refused
Arrived = Callable[[str, TransferMeta, Path], Awaitable[None]]
#: (caller, what it asks for) -> the file; raises Refused
Provider = Callable[[str, PullFile], Awaitable[tuple[Path, TransferMeta]]]
#: (who pulled, what it asked for, what went wrong): a file that a provider gave was sent, or was not
Served = Callable[[str, PullFile, Exception | None], None]
ReportHandler = Callable[[str, list[Report]], None]


@dataclass(frozen=True)
class PublishedRequest:
    """A request for workers and who published it, authenticated; ``traceparent`` names the span in which it
    arrived here.
    """

    publisher: str
    request: WorkerRequest
    traceparent: str | None = None


@dataclass(frozen=True)
class ConnectionInfo:
    """One live connection; ``address`` is the socket's other end, or the circuit. ``round_trip_s`` is what
    its pings took lately, ``None`` before the first has come back. ``name`` is that of the peer's
    certificate, ``organization`` the one that vouches for it, where there is any.
    """

    peer: str
    address: str
    kind: Literal["direct", "relayed"]
    direction: Literal["inbound", "outbound"]
    roles: frozenset[str]
    round_trip_s: float | None = None
    name: str = ""
    organization: str = ""


@dataclass(frozen=True)
class PeerLost:
    """The last connection to ``peer`` ended; ``revoked``: because its certificate is refused from now on."""

    peer: str
    revoked: bool = False


class Changes:
    """Counts changes; whoever waits says up to where it has seen them, so none is missed.

    ``seen = await changes.wait(seen)`` returns at once when something changed since.
    """

    def __init__(self) -> None:
        self.count = 0
        self._next = trio.Event()

    def note(self) -> None:
        self.count += 1
        self._next.set()
        self._next = trio.Event()

    async def wait(self, seen: int | None = None) -> int:
        """Wait for a change after ``seen`` (default: after now); returns the present count."""
        if seen is None:
            seen = self.count
        while self.count <= seen:
            await self._next.wait()
        return self.count


class Listeners(Generic[T]):
    """Channels, each of somebody who listens from then on. Who leaves ``backlog`` items unread misses the
    oldest, each time of which ``missed`` is called.
    """

    def __init__(self, backlog: int, missed: Callable[[], object]) -> None:
        self._backlog = backlog
        self._missed = missed
        self._channels: dict[trio.MemorySendChannel[T], trio.MemoryReceiveChannel[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._channels)

    def tell(self, item: T) -> None:
        """Never blocks."""
        for send, receive in self._channels.items():
            with suppress(trio.BrokenResourceError):  # one has just left
                try:
                    send.send_nowait(item)
                except trio.WouldBlock:
                    receive.receive_nowait()  # this very moment full, so there is an oldest one
                    self._missed()
                    send.send_nowait(item)

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[trio.MemoryReceiveChannel[T]]:
        send, receive = trio.open_memory_channel[T](self._backlog)
        self._channels[send] = receive
        try:
            with send, receive:
                yield receive
        finally:
            del self._channels[send]


class Transfers(Protocol):
    """Sends, pulls, serves and accepts files, whole and verified or not at all."""

    async def send(
        self, peer: PeerRef | str, path: Path, meta: TransferMeta, patience_s: float = 0.0
    ) -> None:
        """Send a file; returns when the receiver has verified and acknowledged it. One that cannot be reached
        is tried again for ``patience_s``.

        Raises Refused, TransferFailed, and TransferCorrupt when the file is not what ``meta`` says.
        """

    async def pull(
        self,
        peer: PeerRef | str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
        still_s: float | None = None,
    ) -> TransferMeta:
        """Have ``peer`` send the file that ``request`` names to ``destination``; what it said of it.

        Resumes ``<destination>.part``. With ``expect``, size and hash must be those; with ``still_s`` it
        fails when nothing came for so long, unless it is this node that is busy. Raises Refused,
        TransferFailed (try again, or elsewhere), TransferCorrupt (elsewhere).
        """

    def serve(self, kind: str, provider: Provider, served: Served | None = None) -> None:
        """Answer pulls of ``kind``. The file must stay as it is while it is being sent; ``served`` is called
        once that is over, for each file that ``provider`` gave, and must not block.
        """

    def accept(self, kind: str, job_id: str | None, gate: Gate, arrived: Arrived) -> Callable[[], None]:
        """Take files of ``kind`` (of the job, or of any job with ``None``) that others send.

        ``gate`` may be asked again for a transfer that was cut. Where ``arrived`` raises Refused, the file is
        deleted and the sender told. The returned function stops accepting and cuts what is on its way.
        """


class Options(Protocol):
    """What a node was opened with, as far as others look at it."""

    @property
    def component(self) -> str:
        """``hypha-worker`` and so on."""

    @property
    def gateways(self) -> Collection[str]:
        """Addresses of the gateways that it was given."""

    @property
    def hop(self) -> bool:
        """Is it a gateway itself?"""


class Node(Protocol):
    """One node of a network."""

    #: what the component adds to its health
    health_details: list[Callable[[], dict[str, str]]]

    @property
    def peer_id(self) -> str:
        """Its PeerID."""

    @property
    def options(self) -> Options:
        """What it was opened with."""

    @property
    def roles(self) -> frozenset[str]:
        """Roles of its own certificate; empty: any."""

    @property
    def uptime_s(self) -> float:
        """Seconds since it was opened."""

    @property
    def transfers(self) -> Transfers:
        """Its bulk plane."""

    @property
    def gateway(self) -> str | None:
        """PeerID of the active gateway."""

    @property
    def gateway_changed(self) -> Changes:
        """Notes every change of the active gateway or of the relay reservation."""

    def sign(self, data: bytes) -> bytes:
        """The signature of this node's key over ``data``, the same each time; ``data`` says what it is."""

    def ref(self) -> PeerRef:
        """This node and its current addresses."""

    def learn(self, ref: PeerRef) -> None:
        """Remember the addresses of a peer."""

    async def wait_connected(self) -> None:
        """Return when a gateway is connected; at once when none is configured."""

    async def connect(self, peer: PeerRef | str) -> None:
        """Be connected to ``peer``; PeerUnreachable when that cannot be."""

    def is_connected(self, peer: str) -> bool:
        """Whether a connection to ``peer`` is live."""

    def connections(self) -> Collection[ConnectionInfo]:
        """All live connections."""

    def roles_of(self, peer: str) -> frozenset[str]:
        """Roles in the certificate of a peer that is or was connected; empty: any role.

        PeerUnreachable when it never was.
        """

    def organization_of(self, peer: str) -> str:
        """The organisation that vouches for a peer that is or was connected; empty where it has no name.

        PeerUnreachable when it never was.
        """

    @property
    def organization(self) -> str:
        """The organisation that vouches for this node; empty where it has no name."""

    def watch_peers(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[PeerLost]]:
        """A channel that says when the last connection to a peer ended."""

    async def request(self, peer: PeerRef | str, request: Request, timeout_s: float = 10.0) -> Response:
        """Ask ``peer``. Raises Refused, PeerUnreachable, RequestTimeout."""

    def answer(
        self,
        kind: type[Any],
        handler: Callable[[str, Any], Awaitable[Response]],
    ) -> None:
        """Answer requests of ``kind`` by ``await handler(caller, request)``; raise Refused to say no.

        Only callers whose role may send them (:data:`hypha.access.REQUESTS`) are heard.
        """

    def prefer(self, is_partner: Callable[[str], bool]) -> None:
        """Keep places for requests of those peers of whom ``is_partner`` says so, because they share a lease
        with this node: what others ask for never makes a renewal ``busy``. A later call replaces this one.
        """

    def report(self, peer: str, report: Report) -> None:
        """Send ``report`` soon; never blocks, and a newer one of the same job and round replaces it."""

    def answer_reports(self, handler: ReportHandler, admits: Callable[[str], bool] | None = None) -> None:
        """Call ``handler(caller, reports)`` for reports that arrive; it must not block. With ``admits`` only
        for those of peers of whom it says so at that moment; the others' streams are ended.
        """

    async def publish(self, message: WorkerRequest) -> None:
        """Ask everybody for workers; waits a moment for a gateway to pass it on."""

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[PublishedRequest]]:
        """A channel of :class:`PublishedRequest`; the publisher is the request's scheduler, and its
        certificate makes it one: both verified.
        """

    async def provide(self, dataset: str) -> int:
        """Announce that this node serves ``dataset``, now and whenever its gateway or addresses change.

        Returns how many gateways took the announcement.
        """

    def withdraw(self, dataset: str) -> None:
        """Stop announcing ``dataset``."""

    async def find_providers(self, dataset: str) -> list[PeerRef]:
        """Who says it serves ``dataset``, each once, with addresses. Hints: probe them."""

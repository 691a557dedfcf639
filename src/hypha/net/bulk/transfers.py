"""The bulk plane: files go whole and verified from node to node, or not at all.

:class:`BulkTransfers` is the whole of it for everybody else. A transfer is agreed on by requests (an offer
and its answer) and carried by a connection of its own, so that ten gigabytes do not delay the renewal of
a lease: mutual TLS on a socket that either side may have dialled, or a libp2p stream through a relay. It
is acknowledged when the receiver has verified it and taken it. The rest is in the ``bulk_*`` modules:
what is said (``wire``), files (``files``), connections (``links``, ``sockets``, ``streams``, ``rendezvous``)
and the two ends (``sending``, ``receiving``).
"""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import trio

from hypha.backoff import NO_JITTER, Backoff
from hypha.config.tuning import TransferTuning
from hypha.errors import (
    NetworkError,
    PeerUnreachable,
    Refused,
    RequestTimeout,
    TransferCorrupt,
    TransferFailed,
)
from hypha.messages import QUICK_KINDS, BulkOffer, JobStamp, PeerRef, PullFile, TransferMeta
from hypha.net.bulk.bandwidth import Caps
from hypha.net.bulk.connection import TransferredBytes
from hypha.net.bulk.files import (
    DiskFailed,
    StreamHash,
    WrongHash,
    hash_file,
    quick_hasher,
    strong_hasher,
)
from hypha.net.bulk.inbound import Acceptor
from hypha.net.bulk.receiving import Receiving
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.roles import require_sender
from hypha.net.bulk.sending import BUSY_FOR_S, FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S, Sending, new_token
from hypha.net.bulk.socket_buffers import AS_THE_KERNEL_LIKES, Buffers
from hypha.net.bulk.wire import BulkConnections
from hypha.node import Arrived, Gate, Provider, Served
from hypha.runtime import in_thread

__all__ = ["BulkConnections", "BulkTransfers", "meta_of"]

#: Threads of the bulk plane beyond those of transfers in which bytes move: for transfers in which nothing
#: does, and handshakes of connections being made.
MAX_THREADS = 56
#: Who waits for a pulled file looks after so long whether it is still coming, and ever more seldom.
FIRST_LOOK_S, LONGEST_LOOK_S = 0.5, 4.0


class BulkTransfers:
    """Sends, pulls, serves and accepts files.

    ``run`` must be running (``await nursery.start(transfers.run)``) before the node listens;
    ``serve_socket`` is for the listener. ``limits``: bytes allowed per kind for what others send. ``caps``
    are those of the node's line, ``tuning`` what ``[tuning.transfers]`` says.
    """

    def __init__(
        self,
        links: BulkConnections,
        limits: Mapping[str, int] | None = None,
        caps: Caps | None = None,
        tuning: TransferTuning | None = None,
        buffers: Buffers = AS_THE_KERNEL_LIKES,
    ) -> None:
        tuning = tuning or TransferTuning()
        self._links = links
        self._tally = TransferredBytes(caps)
        threads = MAX_THREADS + 2 * (tuning.sends + tuning.receives)
        self._rendezvous = Rendezvous(links, self._tally, trio.CapacityLimiter(threads), buffers)
        self._receiving = Receiving(links, self._rendezvous, limits or {}, tuning.receives)
        self._sending = Sending(links, self._rendezvous, tuning)

    @property
    def bytes_sent(self) -> int:
        """Bytes of files sent so far (before compression), repeated ones included."""
        return self._tally.sent

    @property
    def bytes_received(self) -> int:
        """Bytes of files received so far."""
        return self._tally.received

    @property
    def under_way(self) -> dict[str, int]:
        """How many files are on their way, or are to be, ``inbound`` and ``outbound``."""
        return {"inbound": self._receiving.under_way, "outbound": self._sending.under_way}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every thread and socket of the bulk plane is ended."""
        self._rendezvous.start()
        try:
            async with trio.open_nursery() as nursery:
                self._receiving.nursery = self._sending.nursery = nursery
                self._receiving.kept.nursery = self._sending.kept.nursery = nursery
                nursery.start_soon(self._receiving.places.run)
                nursery.start_soon(self._sending.places.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._receiving.nursery = self._sending.nursery = None
            self._receiving.kept.nursery = self._sending.kept.nursery = None
            self._rendezvous.close()

    def serve_socket(self, sock: socket.socket) -> None:
        """Take over an incoming blocking connection; a thread's main function. Returns within the
        handshake time-outs, whatever the peer does, and at once when ``run`` ends. Never raises.
        """
        self._rendezvous.serve_socket(sock)

    async def cut_untrusted(self) -> None:
        """End connections with peers whose certificates are not trusted any more."""
        await self._rendezvous.cut_untrusted()

    async def send(self, peer: PeerRef | str, path: Path, meta: TransferMeta) -> None:
        """Send a file; returns when the receiver has verified and acknowledged it.

        Goes on by itself where a connection was cut, a few times. Raises Refused, TransferFailed, and
        TransferCorrupt when the file is not (any more) what ``meta`` says.
        """
        token = new_token()
        peer_id = _id_of(peer)
        if peer_id == self._links.identity.peer_id:
            await self._receiving.take_local(path, meta, token)
        else:
            await self._sending.send(peer, path, meta, token)

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
        token = new_token()
        pull = _Pull(_id_of(peer), request, destination, expect, max_bytes)
        request = msgspec.structs.replace(request, token=token)
        if pull.peer == self._links.identity.peer_id:
            await self._pull_local(request, pull, token)
        else:
            self._receiving.want(token, pull.peer, pull)
            try:
                await self._follow_while_it_moves(peer, request, pull, token, still_s)
            finally:
                await self._receiving.unwant(token)
        if pull.error is not None:
            raise pull.error
        if pull.meta is None:
            raise TransferFailed(pull.peer, request.name, "it ended without a result")
        return pull.meta

    def serve(self, kind: str, provider: Provider, served: Served | None = None) -> None:
        """Answer pulls of ``kind``: ``await provider(caller, request)`` gives path and meta, or raises
        Refused. The file must stay as it is while it is being sent; ``served(caller, request, error)`` is
        called once that is over.
        """
        self._sending.serve(kind, provider, served)

    def accept(self, kind: str, job_id: str | None, gate: Gate, arrived: Arrived) -> Callable[[], None]:
        """Take files of ``kind`` (of the job, or of any job with ``None``) that others send.

        ``await gate(caller, meta)`` gives the destination, or raises Refused; it may be asked again for
        a transfer that was cut. ``await arrived(caller, meta, path)`` is called when the file lies there,
        verified; it may raise Refused, which deletes the file; then the sender hears of it. The returned
        function stops accepting and cuts what is on its way.
        """
        return self._receiving.accept(kind, job_id, gate, arrived)

    async def _follow_while_it_moves(
        self, peer: PeerRef | str, request: PullFile, pull: _Pull, token: str, still_s: float | None
    ) -> None:
        if still_s is None:
            return await self._follow(peer, request, pull, token)
        failure: NetworkError | None = TransferFailed(
            pull.peer, request.name, f"nothing came for {still_s:g} s"
        )

        async def follow() -> None:
            nonlocal failure
            try:
                await self._follow(peer, request, pull, token)
                failure = None
            except NetworkError as exc:
                failure = exc
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await self._receiving.wait_still(token, still_s)
            nursery.cancel_scope.cancel()
        if failure is not None and not pull.over.is_set():
            raise failure

    async def _follow(self, peer: PeerRef | str, request: PullFile, pull: _Pull, token: str) -> None:
        """Ask, and ask again how it goes, until the file is here or will not come."""
        failures, give_up_at = 0, math.inf
        busy = Backoff(FIRST_BUSY_PAUSE_S, LONGEST_BUSY_PAUSE_S)
        heard = (0, 0)
        looks = Backoff(FIRST_LOOK_S, LONGEST_LOOK_S, jitter=NO_JITTER)
        while not pull.over.is_set():
            try:
                offer = await self._links.request(peer, request)
                require_sender(self._links, pull.peer, request.kind)
                if not isinstance(offer, BulkOffer):
                    raise Refused("malformed", f"it answered a pull with {type(offer).__name__}", pull.peer)
                pull.check(offer.meta)
                failures = 0
            except Refused as exc:
                if pull.over.is_set():
                    return
                give_up_at = min(give_up_at, trio.current_time() + BUSY_FOR_S)
                # only a place is waited for here, as in ``Sending``
                if exc.code == "busy" and trio.current_time() < give_up_at:
                    await trio.sleep(busy.next_s())
                    continue
                if exc.code == "unreachable":
                    raise TransferFailed(pull.peer, request.name, exc.reason) from exc
                raise
            except (PeerUnreachable, RequestTimeout) as exc:
                if self._receiving.heard(token) == heard:
                    # one that is silent in both ways has had its time
                    failures += 1 if isinstance(exc, PeerUnreachable) else 2
                looks.reset()
                # before anything was agreed there is nothing to wait for
                if (failures > 1 or pull.meta is None) and not pull.over.is_set():
                    raise TransferFailed(pull.peer, request.name, str(exc)) from exc
            coming = True
            while coming and not pull.over.is_set():
                heard = self._receiving.heard(token)
                with trio.move_on_after(looks.next_s()):
                    await pull.over.wait()
                # a connection on which nothing moves may be one whose other end has vanished
                moves = self._receiving.heard(token) != heard
                coming = moves and self._receiving.is_coming(token)

    async def _pull_local(self, request: PullFile, pull: _Pull, token: str) -> None:
        path, meta = await self._sending.provide(pull.peer, request)
        pull.check(meta)
        self._receiving.want(token, pull.peer, pull)
        try:
            await self._receiving.take_local(path, meta, token)
        finally:
            await self._receiving.unwant(token)


class _Pull(Acceptor):
    """What a pull is willing to take, and how it ended."""

    def __init__(
        self,
        peer: str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
    ) -> None:
        super().__init__(self._gate, self._arrived, max_bytes)
        self.peer = peer
        self.over = trio.Event()
        self.error: NetworkError | None = None
        self.meta: TransferMeta | None = None
        self._request = request
        self._destination = destination
        self._expect = expect

    def check(self, meta: TransferMeta) -> None:
        """Refused or TransferCorrupt when that is not what was asked for."""
        name = self._request.name
        if meta.size > self.limit:
            raise Refused(
                "too-large", f"{name} has {meta.size} bytes, over the limit of {self.limit}", self.peer
            )
        expect = self._expect
        if meta.kind != self._request.kind:
            # the kind decides how what arrives is checked and kept
            raise TransferCorrupt(self.peer, name, f"it offers a file of the kind {meta.kind!r}")
        if expect is not None and (meta.size, meta.blake3) != (expect.size, expect.blake3):
            raise TransferCorrupt(self.peer, name, "it offers other content than was promised")
        self.meta = meta

    async def _gate(self, caller: str, meta: TransferMeta) -> Path:
        try:
            self.check(meta)
        except NetworkError as exc:
            self._end(exc)
            raise Refused("invalid", "that is not what was asked for") from exc
        return self._destination

    async def _arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        self._end(None)

    def failed(self, reason: Refused | WrongHash | DiskFailed) -> None:
        if isinstance(reason, WrongHash):
            self._end(TransferCorrupt(self.peer, self._request.name, str(reason)))
        else:
            self._end(TransferFailed(self.peer, self._request.name, str(reason)))

    def _end(self, error: NetworkError | None) -> None:
        if not self.over.is_set():
            self.error = error
            self.over.set()


def _id_of(peer: PeerRef | str) -> str:
    return peer.peer if isinstance(peer, PeerRef) else peer


async def meta_of(
    path: Path,
    kind: str,
    name: str,
    *,
    stamp: JobStamp | None = None,
    samples: int = 0,
    contributors: tuple[str, ...] = (),
    encoding: Literal["none", "zstd"] = "none",
    blake3: str = "",
    xxh3: str = "",
) -> TransferMeta:
    """What to say of a file before sending it; hashed in a thread, unless the hashes that it needs are known.
    OSError when it cannot be read.
    """
    size = (await in_thread(path.stat)).st_size
    if not blake3 and kind != "update":
        size, blake3 = await _hashed(path, strong_hasher())
    if not xxh3 and kind in QUICK_KINDS:
        size, xxh3 = await _hashed(path, quick_hasher())
    return TransferMeta(
        kind=kind,
        name=name,
        size=size,
        blake3=blake3,
        stamp=stamp,
        samples=samples,
        contributors=contributors,
        encoding=encoding,
        xxh3=xxh3,
    )


async def _hashed(path: Path, hasher: StreamHash) -> tuple[int, str]:
    stop = threading.Event()
    try:
        return await in_thread(hash_file, path, stop, hasher, abandon_on_cancel=True)
    finally:
        stop.set()

"""The face of the bulk plane: :class:`BulkTransfers`, and what to say of a file before it is sent."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import trio

from hypha.config.tuning import TuningConfig
from hypha.messages import QUICK_KINDS, JobStamp, PeerRef, PullFile, TransferMeta
from hypha.net.bandwidth import Caps
from hypha.net.bulk.connections import TransferredBytes
from hypha.net.bulk.files import StreamHash, hash_file, quick_hasher, strong_hasher
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.pulling import Pulling, WantedFile
from hypha.net.bulk.receiving import Receiving
from hypha.net.bulk.rendezvous import Rendezvous
from hypha.net.bulk.sending import Sending
from hypha.net.bulk.wire import BulkConnections, id_of
from hypha.runtime import in_thread

#: Threads of the bulk plane beyond those of transfers in which bytes move: for transfers in which nothing
#: does, and handshakes of connections being made.
MAX_THREADS = 56


class BulkTransfers:
    """Sends, pulls, serves and accepts files, as :class:`hypha.node.Transfers` says.

    ``run`` must be running (``await nursery.start(transfers.run)``) before the node listens;
    ``serve_socket`` is for the listener. ``caps`` are those of the node's line.
    """

    def __init__(self, links: BulkConnections, caps: Caps, tuning: TuningConfig) -> None:
        self._links = links
        #: bytes of files ``sent`` (before compression, repeated ones included) and ``received`` so far
        self.tally = TransferredBytes(caps)
        threads = MAX_THREADS + 2 * (tuning.transfers.sends + tuning.transfers.receives)
        self._kept = kept = KeptConnections(links.identity)
        limiter = trio.CapacityLimiter(threads)
        self._rendezvous = Rendezvous(links, kept, self.tally, limiter, tuning.sockets)
        self._receiving = Receiving(links, tuning.transfers.receives)
        self._sending = Sending(links, self._rendezvous, kept, tuning.transfers)
        self._pulling = Pulling(links, self._rendezvous, kept, self._receiving)
        self._rendezvous.send, self._rendezvous.receive = self._sending.wanted, self._receiving.offered
        self._rendezvous.has_files = lambda: self._sending.gives or self._receiving.acceptance.takes
        self.serve = self._sending.serve
        self.accept = self._receiving.acceptance.accept
        #: take over an incoming blocking connection
        self.serve_socket = self._rendezvous.serve_socket
        self.cut_untrusted = self._rendezvous.cut_untrusted

    @property
    def under_way(self) -> dict[str, int]:
        """How many files are on their way, or are to be, ``inbound`` and ``outbound``."""
        return {"inbound": self._receiving.acceptance.under_way, "outbound": self._sending.under_way}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every thread and socket of the bulk plane is ended."""
        try:
            async with trio.open_nursery() as nursery:
                self._rendezvous.start(nursery)
                self._kept.nursery = nursery
                nursery.start_soon(self._receiving.places.run)
                nursery.start_soon(self._sending.places.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._kept.nursery = None
            self._rendezvous.close()

    async def send(
        self, peer: PeerRef | str, path: Path, meta: TransferMeta, patience_s: float = 0.0
    ) -> None:
        if id_of(peer) == self._links.identity.peer_id:
            await self._receiving.take_local(path, meta)
        else:
            await self._sending.send(peer, path, meta, patience_s)

    async def pull(
        self,
        peer: PeerRef | str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
        still_s: float | None = None,
    ) -> TransferMeta:
        pull = WantedFile(peer, request, destination, expect, max_bytes)
        if pull.peer_id != self._links.identity.peer_id:
            return await self._pulling.pull(pull, still_s)
        path, meta = await self._sending.provide(pull.peer_id, request)
        pull.check(meta)
        await self._receiving.copy(path, meta, destination)
        return meta


async def meta_of(path: Path, kind: str, name: str, stamp: JobStamp | None = None) -> TransferMeta:
    """What to say of a file before sending it; as :func:`with_hashes`."""
    return await with_hashes(path, TransferMeta(kind=kind, name=name, size=0, stamp=stamp))


async def with_hashes(path: Path, meta: TransferMeta) -> TransferMeta:
    """``meta`` with the size of the file and the hashes that it needs and lacks. OSError."""
    size, blake3, xxh3 = (await in_thread(path.stat)).st_size, meta.blake3, meta.xxh3
    if not blake3 and meta.kind != "update":
        size, blake3 = await _hashed(path, strong_hasher())
    if not xxh3 and meta.kind in QUICK_KINDS:
        size, xxh3 = await _hashed(path, quick_hasher())
    return msgspec.structs.replace(meta, size=size, blake3=blake3, xxh3=xxh3)


async def _hashed(path: Path, hasher: StreamHash) -> tuple[int, str]:
    stop = threading.Event()
    try:
        return await in_thread(hash_file, path, stop, hasher, abandon_on_cancel=True)
    finally:
        stop.set()

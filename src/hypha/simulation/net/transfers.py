"""The bulk plane of a simulated node: real files, gates, places and hashes, over simulated lines.

A file's bytes are read when its turn comes, cross the network as a flow that shares bandwidth with others,
and are written, verified and handed over in the receiver's process. What was cut begins anew. Whoever pulls
has a place here first, then asks, and the bytes follow the answer; a connection that carried the last file
from there needs no handshake.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from hypha.access import KINDS, Allowed, named
from hypha.errors import PeerUnreachable, Refused, TransferCorrupt, TransferFailed
from hypha.files.staging import write_whole
from hypha.messages import PeerRef, PullFile, TransferMeta
from hypha.net.bulk.files import StreamHash, quick_hasher, strong_hasher
from hypha.net.bulk.inbound import Acceptance, Inbound
from hypha.net.bulk.pulling import WantedFile
from hypha.net.bulk.receiving import MAX_REMEMBERED, RESERVE_BYTES
from hypha.net.bulk.turns import Retries, TransferSlots
from hypha.net.peers.inbound_limits import Recent
from hypha.node import Provider, Served
from hypha.runtime import free_bytes, in_thread, new_id
from hypha.simulation.net.network import STALL_S, SimulatedLinkBroken

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

logger = logging.getLogger("hypha.simulation")

#: as in hypha.net.bulk.sending and hypha.net.bulk.receiving
_MAX_AT_ONCE = 2
_FIRST_WORD_S = 10.0


class SimulatedTransfers:
    """Of one node; see :class:`hypha.node.Transfers`."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._acceptance = Acceptance()
        self.accept = self._acceptance.accept
        self._providers: dict[str, Provider] = {}
        self._done: Recent[tuple[str, str], None] = Recent(MAX_REMEMBERED)
        #: from whom the last pull came, so that a connection is kept
        self._reached: dict[str, SimulatedNode] = {}
        self.sending = TransferSlots(_MAX_AT_ONCE)
        self.receiving = TransferSlots(_MAX_AT_ONCE)

    async def run(self) -> None:
        """Lend the places of transfers in which nothing moves, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sending.run)
            nursery.start_soon(self.receiving.run)

    def serve(self, kind: str, provider: Provider, served: Served | None = None) -> None:
        """Answer pulls of ``kind``; ``served`` is for metrics and traces, which a simulated node has not."""
        self._providers[kind] = provider

    # --- sending ------------------------------------------------------------------------------------

    async def send(
        self, peer: PeerRef | str, path: Path, meta: TransferMeta, patience_s: float = 0.0
    ) -> None:
        name = self._node.known(peer)
        token = new_id()
        if name == self._node.peer_id:
            await self.take(name, meta, token, await in_thread(path.read_bytes))
            return
        retries = Retries(patience_s)
        while True:
            try:
                return await self._attempt(name, path, meta, token)
            except OSError as exc:
                raise TransferFailed(name, meta.name, f"{path} cannot be read: {exc}") from exc
            except Refused as exc:
                refusal = Refused(exc.code, exc.reason, name)
                await trio.sleep(retries.refused(refusal, trio.current_time()))
            except (PeerUnreachable, SimulatedLinkBroken) as exc:
                failure = TransferFailed(name, meta.name, str(exc))
                await trio.sleep(retries.broke(failure, trio.current_time()))

    async def _attempt(self, name: str, path: Path, meta: TransferMeta, token: str) -> None:
        progress = [0.0]
        async with self.sending.hold(lambda: progress[0]):
            data = await in_thread(path.read_bytes)

            async def receive(node: SimulatedNode) -> None:
                await node.transfers.take(self._node.peer_id, meta, token, data, progress)

            await self._node.ask_there(name, receive, None)

    async def take(
        self, caller: str, meta: TransferMeta, token: str, data: bytes, progress: list[float] | None = None
    ) -> None:
        """One whole attempt to receive a file, in the receiver's process; ``progress`` is the sender's.
        Raises Refused, TransferCorrupt and SimulatedLinkBroken.
        """
        if (caller, token) in self._done:
            return
        self._require(caller, KINDS[meta.kind].senders, meta.kind)
        acceptor = self._acceptance.acceptor_of(meta)
        destination = await acceptor.gate(caller, meta)
        if meta.size > max(0, free_bytes(destination.parent) - RESERVE_BYTES):
            raise Refused("no-space", f"{meta.name} has {meta.size} bytes; the disk of {destination} is full")
        inbound = Inbound(token, caller, meta, destination, acceptor)
        await self._acceptance.claim(inbound)
        with self._acceptance.tracked(inbound), inbound.scope:
            held = [0.0]
            async with self.receiving.hold(lambda: held[0]):
                if caller != self._node.peer_id:
                    await self._flow(caller, len(data), STALL_S, held, progress)
                self._write(destination, data, meta, caller)
            inbound.settling = True
            try:
                await acceptor.arrived(caller, meta, destination)
            except Refused:
                destination.unlink(missing_ok=True)
                raise
            self._done[caller, token] = None
        if inbound.scope.cancelled_caught:
            raise SimulatedLinkBroken("the receiver does not want it any more")

    def _require(self, peer: str, allowed: Allowed, kind: str) -> None:
        if peer != self._node.peer_id and not self._node.may(peer, allowed):
            raise Refused("role", f"files of kind {kind!r} need the role {named(allowed)}")

    async def _flow(
        self,
        source: str,
        size: int,
        stall_s: float,
        held: list[float],
        progress: list[float] | None,
        kept: bool = False,
    ) -> None:
        def moved(bytes_: float) -> None:
            held[0] = bytes_
            if progress is not None:
                progress[0] = bytes_

        await self._node.network.flow(source, self._node.peer_id, size, stall_s, moved, kept)

    def _write(self, destination: Path, data: bytes, meta: TransferMeta, source: str) -> None:
        """Whole and verified, or not at all."""
        hasher: StreamHash = strong_hasher() if meta.checked == meta.blake3 else quick_hasher()
        hasher.update(data)
        if len(data) != meta.size or hasher.hexdigest() != meta.checked:
            raise TransferCorrupt(source, meta.name, "its content is not what was promised")
        write_whole(destination, data)

    # --- pulling ------------------------------------------------------------------------------------

    async def pull(
        self,
        peer: PeerRef | str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
        still_s: float | None = None,
    ) -> TransferMeta:
        name = self._node.known(peer)
        request = msgspec.structs.replace(request, token=new_id())
        retries = Retries()
        while True:
            try:
                return await self._pull(name, request, destination, expect, max_bytes, still_s)
            except Refused as exc:
                if exc.code == "unreachable":
                    raise TransferFailed(name, request.name, exc.reason) from exc
                refusal = Refused(exc.code, exc.reason, name)
                await trio.sleep(retries.refused(refusal, trio.current_time()))
            except (PeerUnreachable, SimulatedLinkBroken) as exc:
                raise TransferFailed(name, request.name, str(exc)) from exc

    async def _pull(
        self,
        name: str,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
        still_s: float | None,
    ) -> TransferMeta:
        held = [0.0]
        async with self.receiving.hold(lambda: held[0]):
            data, meta = await self._ask(name, request)
            WantedFile(name, request, destination, expect, max_bytes).check(meta)
            if meta.size > max(0, free_bytes(destination.parent) - RESERVE_BYTES):
                raise TransferFailed(name, request.name, "there is no room for it here")
            sender = self._node.network.nodes.get(name)
            if sender is None:
                raise SimulatedLinkBroken("the other end is gone")
            kept = self._reached.pop(name, None) is sender
            await self._flow_from(sender, len(data), still_s, held, kept)
            self._reached[name] = sender
            self._write(destination, data, meta, name)
        return meta

    async def _ask(self, name: str, request: PullFile) -> tuple[bytes, TransferMeta]:
        """What the file is, and its bytes, which have still to come."""

        async def provide(node: SimulatedNode) -> tuple[bytes, TransferMeta]:
            return await node.transfers.provide_to(self._node.peer_id, request)

        with trio.move_on_after(_FIRST_WORD_S) as asking:
            provided: tuple[bytes, TransferMeta] = await self._node.ask_there(name, provide, None)
        if asking.cancelled_caught:
            raise SimulatedLinkBroken("it does not answer")
        self._require(name, KINDS[request.kind].senders, request.kind)
        return provided

    async def _flow_from(
        self, sender: SimulatedNode, size: int, still_s: float | None, held: list[float], kept: bool
    ) -> None:
        """Have the bytes come when it is their turn there."""
        broken: SimulatedLinkBroken | None = None
        async with trio.open_nursery() as nursery:
            # the sender's end has few places, too
            over = trio.Event()
            ready = trio.Event()
            nursery.start_soon(self._lend, sender, held, ready, over)
            try:
                with trio.move_on_after(math.inf if still_s is None else still_s) as waiting:
                    await ready.wait()
                if waiting.cancelled_caught:
                    raise SimulatedLinkBroken(f"nothing came for {still_s:g} s")
                stall_s = STALL_S if still_s is None else min(STALL_S, still_s)
                await self._flow(sender.peer_id, size, stall_s, held, None, kept)
            except SimulatedLinkBroken as exc:
                broken = exc
            over.set()
            nursery.cancel_scope.cancel()
        if broken is not None:
            raise broken

    async def _lend(
        self, sender: SimulatedNode, held: list[float], ready: trio.Event, over: trio.Event
    ) -> None:
        async def hold() -> None:
            async with sender.transfers.sending.hold(lambda: held[0]):
                ready.set()
                await over.wait()

        try:
            await sender.process.call(hold)
        except Exception as exc:  # noqa: BLE001 - the flow itself notices that the sender is gone
            logger.debug("The sender of a file is gone: %s", exc)
            ready.set()

    async def provide_to(self, caller: str, request: PullFile) -> tuple[bytes, TransferMeta]:
        """The bytes of a file that ``caller`` pulls, and what is said of it. Raises Refused."""
        self._require(caller, KINDS[request.kind].receivers, request.kind)
        provider = self._providers.get(request.kind)
        if provider is None:
            raise Refused("not-found", f"there are no files of kind {request.kind!r} here")
        path, meta = await provider(caller, request)
        try:
            return path.read_bytes(), meta
        except OSError as exc:
            raise Refused("not-found", f"{request.name} cannot be read: {exc}") from exc

    def idle(self) -> bool:
        return not self._acceptance.under_way and not self.sending.held and not self.receiving.held

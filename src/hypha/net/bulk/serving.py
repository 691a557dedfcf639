"""The providing end of pulls: files that others ask for, over a connection of theirs or by a request.

Whoever asks over a connection gets the file over that very one, when it has one of the few places for
sending. Whoever asks by a request is sent the file as it is done by :mod:`hypha.net.bulk.sending`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.errors import NetworkError, Refused, TransferCorrupt, TransferFailed
from hypha.messages import BulkOffer, PullFile, TransferMeta
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.files import FileChanged
from hypha.net.bulk.kept_connections import KeptConnections
from hypha.net.bulk.sending import SendAttempt, Sending
from hypha.net.bulk.signals import sending
from hypha.net.bulk.wire import (
    BulkConnections,
    ConnectionBroken,
    FileFound,
    Go,
    Verdict,
    WantFile,
    fits,
    require_receiver,
)
from hypha.net.peers.inbound_limits import counted
from hypha.node import Provider, Served
from hypha.tracing import trace_context, traceparent

logger = logging.getLogger(__name__)

#: Pulls being served, in all and to one peer.
MAX_SERVED = 1024
MAX_SERVED_PER_PEER = 64
#: How long the end of a pull that was asked for by a request is remembered for a puller that asks.
REMEMBER_S = 60.0


@dataclass(eq=False)
class _Pulled:
    """A request to be sent a file, being answered."""

    meta: TransferMeta | None = None
    ready: trio.Event = field(default_factory=trio.Event)
    error: NetworkError | None = None


class ServingPulls:
    """Gives files to those who ask for them."""

    def __init__(self, links: BulkConnections, kept: KeptConnections, sending: Sending) -> None:
        self._links = links
        self._kept = kept
        self._sending = sending
        self._providers: dict[str, Provider] = {}
        self._told_of_served: dict[str, Served] = {}
        #: by who asks, over whatever
        self._being_served: Counter[str] = Counter()
        self._pulled: dict[tuple[str, str], _Pulled] = {}
        self.nursery: trio.Nursery | None = None
        links.answer(PullFile, self._asked)

    def serve(self, kind: str, provider: Provider, served: Served | None = None) -> None:
        self._providers[kind] = provider
        if served is not None:
            self._told_of_served[kind] = served

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        """The file that a pull names. Refused."""
        if not 16 <= len(request.token) <= 64:
            raise Refused("malformed", "the token of a pull has 16 to 64 characters")
        require_receiver(self._links, caller, request.kind)
        provider = self._providers.get(request.kind)
        if provider is None:
            raise Refused("not-found", f"no files of kind {request.kind!r} are served here")
        return await provider(caller, request)

    @contextmanager
    def _counted(self, caller: str) -> Iterator[None]:
        if self._being_served.total() >= MAX_SERVED or self._being_served[caller] >= MAX_SERVED_PER_PEER:
            raise Refused("busy", "too many files are being sent from here; try again later")
        with counted(self._being_served, caller):
            yield

    async def wanted(self, link: BulkConnection, want: WantFile) -> None:
        """Answer, with the file; then the link is kept or closed. Never raises for what a peer does."""
        reusable = False
        try:
            with trace_context(want.traceparent):
                reusable = await self._answer(link, want)
        except ConnectionBroken as exc:
            logger.info(
                "Sending %s was interrupted: %s.", want.request.name, exc, extra={"peer_id": link.peer}
            )
        except Exception:  # the edge of a task for a peer that pulls
            logger.exception("Sending %s failed.", want.request.name, extra={"peer_id": link.peer})
        finally:
            if not (reusable and self._kept.give(link, speaks=False)):
                await link.close()

    async def _answer(self, link: BulkConnection, want: WantFile) -> bool:
        """Whether the link is as it was before. ConnectionBroken."""
        caller, request = link.peer, want.request
        try:
            with self._counted(caller):
                try:
                    path, meta = await link.while_working(lambda: self.provide(caller, request))
                except Refused:
                    raise
                except NetworkError as exc:
                    raise Refused("unreachable", str(exc)) from exc
                except Exception as exc:  # the edge of the service: one bad request must not end the node
                    logger.exception("Providing %s failed.", request.name, extra={"peer_id": caller})
                    raise Refused("internal", "it failed there; its log says more") from exc
                return await self._send(link, want, path, meta)
        except Refused as exc:
            await link.say(Verdict("refused", exc.code, exc.reason))
            return True

    async def _send(self, link: BulkConnection, want: WantFile, path: Path, meta: TransferMeta) -> bool:
        async def deliver() -> None:
            with self._sending.counted(), sending(link.peer, meta):
                await self._deliver(link, want, path, meta)

        return await self._told(link.peer, want.request, meta, deliver) is None

    async def _deliver(self, link: BulkConnection, want: WantFile, path: Path, meta: TransferMeta) -> None:
        """Raises TransferFailed, TransferCorrupt and Refused."""
        attempt = SendAttempt(
            link.peer, path, meta, want.request.token, self._sending.packing_for(link.peer, meta, want.go)
        )
        try:
            async with AsyncExitStack() as stack:
                place = self._sending.places.hold(attempt.moved)
                await link.while_working(lambda: stack.enter_async_context(place))
                source = stack.enter_context(await self._sending.opened(attempt))
                packs = attempt.packing is not None
                found = FileFound(meta, packs, traceparent())
                if not fits(found):
                    raise FileChanged(f"what there is to say of {meta.name} is too long")
                go = Go(want.go.offset, want.go.key, packs)
                await link.say(found)
                verdict = await self._sending.deliver(attempt, source, link, go)
        except FileChanged as exc:
            if attempt.link is None:
                with suppress(ConnectionBroken):
                    await link.say(Verdict("failed", reason=str(exc)))
            raise TransferFailed(link.peer, meta.name, str(exc)) from exc
        except ConnectionBroken as exc:
            raise TransferFailed(link.peer, meta.name, str(exc)) from exc
        verdict.raise_if_refused(link.peer)
        if verdict.outcome != "ok":
            raise TransferCorrupt(link.peer, meta.name, verdict.reason or "it arrived with another hash")

    async def _told(
        self, caller: str, request: PullFile, meta: TransferMeta, send: Callable[[], Awaitable[None]]
    ) -> NetworkError | None:
        """``send``, and tell whoever provided the file how that ended."""
        failure: NetworkError | None = None
        try:
            await send()
        except NetworkError as exc:
            failure = exc
            logger.warning(
                "Sending %s, which a peer asked for, failed: %s", meta.name, exc, extra={"peer_id": caller}
            )
        except Exception as exc:  # the edge of a task for a peer that pulls
            failure = TransferFailed(caller, meta.name, f"it failed there ({exc!r})")
            logger.exception("Sending %s failed.", meta.name, extra={"peer_id": caller})
        if (tell := self._told_of_served.get(request.kind)) is not None:
            tell(caller, request, failure)
        return failure

    async def _asked(self, caller: str, request: PullFile) -> BulkOffer:
        """Somebody wants to be sent a file: say what it is, and start. The same token asks how it goes."""
        if self.nursery is None:
            raise Refused("busy", "this node is closing")
        key = (caller, request.token)
        pulled = self._pulled.get(key)
        if pulled is None:
            pulled = self._pulled[key] = _Pulled()
            counted = ExitStack()
            try:
                counted.enter_context(self._counted(caller))
                path, pulled.meta = await self.provide(caller, request)
            except BaseException:
                counted.close()
                del self._pulled[key]
                raise
            finally:
                pulled.ready.set()
            self.nursery.start_soon(self._be_pulled, pulled, path, pulled.meta, caller, request, counted)
        await pulled.ready.wait()
        if pulled.error is not None:
            if isinstance(pulled.error, Refused):
                raise Refused(pulled.error.code, pulled.error.reason)
            raise Refused("unreachable", str(pulled.error))
        if pulled.meta is None:
            raise Refused("internal", f"{request.name} could not be provided")
        return BulkOffer(token=request.token, meta=pulled.meta, addresses=())

    async def _be_pulled(
        self,
        pulled: _Pulled,
        path: Path,
        meta: TransferMeta,
        caller: str,
        request: PullFile,
        counted: ExitStack,
    ) -> None:
        async def send() -> None:
            await self._sending.send(caller, path, meta, request.token, pulled=True)

        try:
            with counted:
                pulled.error = await self._told(caller, request, meta, send)
                if pulled.error is not None:
                    await trio.sleep(REMEMBER_S)
        finally:
            del self._pulled[caller, request.token]

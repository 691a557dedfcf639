"""The bridge as a simulated executor has it: its worker's handlers, reached through a process
that may die.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import trio

from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.messages import (
    Alive,
    Directive,
    Event,
    FetchedFile,
    Progress,
    ReceivedFile,
    Reference,
    SendCall,
    Sent,
)
from hypha.node import Changes
from hypha.simulation.executors.tasks import Tasks
from hypha.simulation.process import SimulatedProcess
from hypha.worker.bridge.feeds import Feed
from hypha.worker.bridge.server import BridgeHandlers

if TYPE_CHECKING:
    from hypha.executor.bridge.client import BridgeClient

T = TypeVar("T")

_FLUSH_S = 3.0


class Bridge:
    """An executor's end of it, whose tasks are in ``nursery``: calls run in the worker's process, events go
    there in order.
    """

    def __init__(
        self, handlers: BridgeHandlers, worker: SimulatedProcess, directory: Path, nursery: trio.Nursery
    ) -> None:
        self.directory = directory
        self.threads = Tasks(nursery)
        self._nursery = nursery
        self._handlers = handlers
        self._worker = worker
        self._events: deque[Event] = deque()
        self._changed = Changes()

    @property
    def client(self) -> BridgeClient:
        """As real executors know it."""
        return cast("BridgeClient", self)

    async def fetch(self, reference: Reference) -> list[tuple[Path, FetchedFile]]:
        """Have the worker fetch ``reference``. Raises Refused and PeerUnreachable."""
        files = await self._asked(lambda: self._handlers.fetch(reference))
        return [(self.directory / file.path, file) for file in files]

    async def send(self, call: SendCall) -> Sent:
        """Have the worker send a file. Raises Refused or PeerUnreachable when nobody acknowledged."""
        return await self._asked(lambda: self._handlers.send(call))

    async def _asked(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._worker.call(call)
        except Refused:
            raise
        except NetworkError as exc:
            raise PeerUnreachable("behind the bridge", str(exc)) from exc

    async def patiently(self, call: Coroutine[Any, Any, T]) -> T:
        return await call

    def relative(self, path: Path) -> str:
        return path.relative_to(self.directory).as_posix()

    def report(self, event: Event) -> None:
        if isinstance(event, Progress) and self._events and isinstance(self._events[-1], Progress):
            self._events.pop()
        if isinstance(event, Alive) and self._events:
            return
        self._events.append(event)
        self._changed.note()

    async def run(self) -> None:
        """Deliver events, until cancelled."""
        while True:
            while self._events:
                event = self._events[0]

                async def say(event: Event = event) -> None:
                    self._handlers.report(event)

                await self._worker.call(say)
                if self._events and self._events[0] is event:
                    self._events.popleft()
                self._changed.note()
            await self._changed.wait()

    async def flush(self) -> None:
        """Wait until the worker has all events, for a few seconds."""
        with trio.move_on_after(_FLUSH_S):
            while self._events:
                await self._changed.wait()

    def directives(self, handler: Callable[[Directive], None]) -> None:
        """Call ``handler`` for each from now on."""
        self._nursery.start_soon(self._follow, self._handlers.directives.open, handler)

    def receive(self, kinds: tuple[str, ...], handler: Callable[[ReceivedFile], None]) -> None:
        """Call ``handler`` for each file that arrives."""
        open_ = partial(self._handlers.arrivals.open, frozenset(kinds))
        self._nursery.start_soon(self._follow, open_, handler)

    async def _follow(
        self, open_: Callable[[], AbstractContextManager[Feed[Any]]], handler: Callable[[Any], None]
    ) -> None:
        send, receive = trio.open_memory_channel[Any](float("inf"))

        async def pump() -> None:
            with open_() as feed:
                while True:
                    send.send_nowait(await feed.get())

        async def consume() -> None:
            async for item in receive:
                handler(item)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            await self._worker.call(pump)

"""One connection of the bulk plane, whichever way it was made: what its users see of it."""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

import outcome
import trio

from hypha.messages import TransferMeta
from hypha.net.bulk.bandwidth import Caps
from hypha.net.bulk.compression import SAMPLE_BYTES, Packing
from hypha.net.bulk.files import PartFile, SourceFile
from hypha.net.bulk.wire import (
    WORKING_INTERVAL_S,
    BlockPacker,
    ConnectionBroken,
    Frame,
    Go,
    Verdict,
    Working,
)
from hypha.net.byte_counts import ByteCounts

T = TypeVar("T")


class TransferredBytes:
    """Bytes of files sent and received, counted from many threads; ``sockets`` counts those that the bulk
    plane's own connections carry. ``caps`` are those of the node.
    """

    def __init__(self, caps: Caps | None = None) -> None:
        self.caps = caps or Caps()
        self._lock = threading.Lock()
        self.sockets = ByteCounts("bulk")
        self.sent = 0
        self.received = 0

    def add(self, sent: int = 0, received: int = 0) -> None:
        """Count."""
        with self._lock:
            self.sent += sent
            self.received += received


class BulkConnection(ABC):
    """A connection whose other end is proven to be ``peer``."""

    def __init__(self, peer: str, tally: TransferredBytes) -> None:
        self.peer = peer
        #: how it was made, and whether it was kept from an earlier transfer; for the log and for traces
        self.way = ""
        self.was_kept = False
        #: whether the other end is of a version that knows ``WantFile``
        self.knows_want = False
        #: bytes that came and went so far, whatever they were
        self.heard = 0
        self.went = 0
        self._tally = tally

    @property
    def is_relayed(self) -> bool:
        """Whether it runs through a gateway."""
        return False

    @abstractmethod
    async def say(self, frame: Frame) -> None:
        """Send a frame. ConnectionBroken."""

    @abstractmethod
    async def hear(self) -> Frame:
        """The next frame. ConnectionBroken, also when nothing comes within the stall time-out."""

    async def ask(self, frame: Frame) -> Frame:
        """Send a frame; the next one that comes. ConnectionBroken."""
        await self.say(frame)
        return await self.hear()

    @abstractmethod
    async def deliver(
        self, source: SourceFile, meta: TransferMeta, go: Go, packing: Packing | None = None
    ) -> Verdict:
        """Send the file as ``go`` wants it, where that allows it compressed as ``packing`` thinks fit; the
        receiver's verdict. ConnectionBroken, FileChanged.
        """

    def new_go(self, offset: int, zstd_blocks: bool) -> Go:
        """What to say as the receiver of one file, once."""
        return Go(offset, zstd_blocks=zstd_blocks)

    @abstractmethod
    async def collect(self, part: PartFile, meta: TransferMeta, go: Go) -> None:
        """Receive the file into ``part``, which is open, as ``go``, which was said, asks for it.
        ConnectionBroken, DiskFailed.
        """

    @abstractmethod
    async def drain(self) -> None:
        """Read and forget what comes, for a moment; never raises."""

    @abstractmethod
    async def close(self) -> None:
        """End it, also while being cancelled; never raises."""

    def _count_sent(self, count: int) -> None:
        self._tally.add(sent=count)

    @staticmethod
    def _packed(
        packer: BlockPacker | None, packing: Packing | None, block: memoryview
    ) -> tuple[memoryview | bytes, bool]:
        """A block as it is to go, and whether its length has to say that it is compressed."""
        if packer is None:
            return block, False
        if packing is None:
            return packer.pack(block), False
        if packing.wants_sample(len(block)):
            began = time.perf_counter()
            sample = packer.pack(block[:SAMPLE_BYTES])
            packing.sampled(SAMPLE_BYTES, len(sample), time.perf_counter() - began)
        if packing.pays:
            began = time.perf_counter()
            packed = packer.pack(block)
            if packing.packed(len(block), len(packed), time.perf_counter() - began):
                return packed, True
        return block, False

    async def while_working(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of ``work``; the other end hears ``Working`` now and then meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_working)
            # captured, so that its error comes out as itself and not in a group
            result = await outcome.acapture(work)
            nursery.cancel_scope.cancel()
        return result.unwrap()

    async def _say_working(self) -> None:
        while True:
            await trio.sleep(WORKING_INTERVAL_S)
            # shielded: a frame sent by half would be the end of the connection
            with trio.CancelScope(shield=True), contextlib.suppress(ConnectionBroken):
                await self.say(Working())

"""What comes over a connection becomes a file: collected beside its destination, verified, handed over.

What is cut stays in the ``.part`` file for the next attempt; what is corrupt or refused is deleted. The other
end is told how it ended when it has ended, and not before.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import trio

from hypha.errors import Refused
from hypha.messages import PullFile, TransferMeta
from hypha.net.bulk.connection import BulkConnection
from hypha.net.bulk.files import DiskFailed, PartFile, WrongHash
from hypha.net.bulk.inbound import Inbound
from hypha.net.bulk.wire import ConnectionBroken, Go, Verdict

logger = logging.getLogger(__name__)

#: Part files of which it is remembered what they are parts of.
MAX_PARTS = 4096
#: Finished transfers remembered, for a sender that did not hear the acknowledgement.
MAX_REMEMBERED = 512


class Collecting:
    """Collects files; ``limiter`` is for threads that write them."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter
        #: what the .part files of this process are parts of
        self._parts: dict[Path, TransferMeta] = {}
        #: by caller and token: transfers that were finished
        self.done: dict[tuple[str, str], int] = {}

    def part_of(self, destination: Path, request: PullFile) -> TransferMeta | None:
        """What the part file of ``destination`` is a part of, if this process has begun it for such a
        ``request``.
        """
        meta = self._parts.get(destination)
        same = meta is not None and (meta.kind, meta.name) == (request.kind, request.name)
        return meta if same else None

    async def open_part(self, inbound: Inbound) -> PartFile:
        """The part file of ``inbound``, open where it goes on; the caller has it filled by ``collect``, or
        abandons it. DiskFailed.
        """
        meta, destination = inbound.meta, inbound.destination
        part = PartFile(destination, meta)
        known = self._parts.get(destination, meta)
        fresh = inbound.started_afresh or known.checked != meta.checked
        if len(self._parts) >= MAX_PARTS:
            del self._parts[next(iter(self._parts))]
        self._parts[destination] = meta
        done = False
        try:
            await trio.to_thread.run_sync(part.open, fresh, abandon_on_cancel=True, limiter=self._limiter)
            done = True
        except DiskFailed:
            part.discard()
            raise
        finally:
            if not done:
                part.abandon()
        return part

    async def collect(self, link: BulkConnection, inbound: Inbound, part: PartFile, go: Go) -> Verdict | None:
        """Receive what ``go`` asks for, verify it, hand it over, and tell the other end: the verdict, or None
        when there is something left to try. ConnectionBroken.
        """
        try:
            await link.collect(part, inbound.meta, go)
            inbound.settling = True
            await link.while_working(lambda: trio.to_thread.run_sync(part.finish, limiter=self._limiter))
        except WrongHash as exc:
            return await self._corrupt(link, inbound, exc, again=go.offset > 0 and not inbound.started_afresh)
        except DiskFailed as exc:
            part.discard()
            return await self.disk_failed(link, inbound, exc)
        finally:
            part.abandon()
        verdict = await link.while_working(lambda: self._arrived(inbound))
        self._parts.pop(inbound.destination, None)
        if verdict.outcome == "ok":
            inbound.acceptor.came_over(link)
            self.done[inbound.caller, inbound.token] = inbound.meta.size
            if len(self.done) > MAX_REMEMBERED:
                del self.done[next(iter(self.done))]
        with contextlib.suppress(ConnectionBroken):  # a sender that misses it asks again
            await link.say(verdict)
        return verdict

    async def disk_failed(self, link: BulkConnection, inbound: Inbound, exc: DiskFailed) -> Verdict:
        """Tell both ends that it cannot be written."""
        logger.error("%s", exc, extra=inbound.log_fields)
        refusal = Verdict("refused", "no-space" if exc.full else "internal", str(exc))
        inbound.acceptor.failed(exc)
        with contextlib.suppress(ConnectionBroken):
            await link.say(refusal)
        await link.drain()
        return refusal

    async def _corrupt(
        self, link: BulkConnection, inbound: Inbound, exc: WrongHash, again: bool
    ) -> Verdict | None:
        # what an earlier process left behind may have been part of something else: once more, from 0
        inbound.started_afresh = True
        inbound.settling = False
        self._parts.pop(inbound.destination, None)
        logger.warning("What arrived is corrupt and was deleted: %s", exc, extra=inbound.log_fields)
        if not again:
            inbound.acceptor.failed(exc)
        verdict = Verdict("corrupt", reason=str(exc), again=again)
        with contextlib.suppress(ConnectionBroken):
            await link.say(verdict)
        return None if again else verdict

    async def _arrived(self, inbound: Inbound) -> Verdict:
        try:
            await inbound.acceptor.arrived(inbound.caller, inbound.meta, inbound.destination)
        except Refused as exc:
            refused = exc
        except Exception:  # the edge of the service: the receiver's own code failed
            logger.exception("Taking %s failed.", inbound.meta.name, extra=inbound.log_fields)
            refused = Refused("internal", f"taking {inbound.meta.name} failed there; its log says more")
        else:
            return Verdict("ok")
        inbound.destination.unlink(missing_ok=True)
        inbound.acceptor.failed(refused)
        return Verdict("refused", refused.code, refused.reason)

"""What peers may send to an executor: only those who take part, only this generation of the job.

A file lands in ``incoming/``, once it is whole, under a name made of its round, hash and sender: two files
never share one, and a transfer that was cut is resumed where it was. One that still waits for the executor is
not taken twice; one that it has worked off is, since what a repetition means is for the executor to decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from hypha.errors import Refused
from hypha.messages import JobStamp, ReceivedFile, TransferMeta
from hypha.worker.bridge.feeds import FileArrivals
from hypha.worker.jobs.directory import JobDirectory

logger = logging.getLogger("hypha.worker.receive")

#: Files of one sender that the executor has not deleted yet; more are ``busy``.
MAX_WAITING = 8


class ExecutorInbox:
    """``senders`` gives the PeerIDs that may send now, None while that is not known yet."""

    def __init__(
        self,
        stamp: JobStamp,
        directory: JobDirectory,
        arrivals: FileArrivals,
        senders: Callable[[], frozenset[str] | None],
        max_bytes: int,
    ) -> None:
        self._stamp = stamp
        self._directory = directory
        self._arrivals = arrivals
        self._senders = senders
        self._max_bytes = max_bytes
        #: by sender: generation, round and attempt
        self._newest: dict[str, tuple[int, int, int]] = {}
        #: files of an earlier generation of the job
        self.refused = 0

    def begin_generation(self, generation: int) -> None:
        """What is of an earlier generation is refused from now on."""
        self._stamp = msgspec.structs.replace(self._stamp, generation=generation)

    async def gate(self, caller: str, meta: TransferMeta) -> Path:
        """Where the file goes; ``Refused`` when it may not come in."""
        stamp = self._fence(caller, meta)
        senders = self._senders()
        if senders is None:
            raise Refused("busy", "this executor does not know yet who takes part")
        if caller not in senders:
            raise Refused("uninvited", f"{caller} may not send {meta.kind} to this executor")
        if meta.size > self._max_bytes:
            raise Refused("too-large", f"{meta.size} bytes, allowed are {self._max_bytes}")
        if not meta.checked.isalnum() or not meta.kind.isalnum():
            raise Refused("malformed", "kind and hash must be plain words")
        # theta of another attempt at the round has the same bytes and another meaning
        name = f"{meta.kind}-{stamp.generation}-{stamp.round}-{stamp.attempt}-{meta.checked[:32]}-{caller}"
        waiting = [file for file in self._arrivals.waiting() if file.from_peer == caller]
        if any(file.path == f"incoming/{name}" for file in waiting):
            raise Refused("duplicate", f"this {meta.kind} of round {stamp.round} is here already")
        if len(waiting) >= MAX_WAITING:
            raise Refused("busy", "earlier files are not worked off yet")
        return self._directory.receiving(name)

    async def arrived(self, caller: str, meta: TransferMeta, path: Path) -> None:
        """The file is whole, verified and durable, but not acknowledged yet; the executor gets it."""
        stamp = self._fence(caller, meta)
        delivered = self._directory.deliver(path)
        newest = (stamp.generation, stamp.round, stamp.attempt)
        self._newest[caller] = max(self._newest.get(caller, newest), newest)
        self._arrivals.put(ReceivedFile(path=delivered, size=meta.size, from_peer=caller, meta=meta))

    def _fence(self, caller: str, meta: TransferMeta) -> JobStamp:
        stamp = meta.stamp
        if stamp is None or stamp.job_id != self._stamp.job_id:
            raise Refused("malformed", "the file carries no stamp of this job")
        if stamp.generation < self._stamp.generation:
            self.refused += 1
            logger.warning(
                "A %s of generation %d, which is over, was refused (%d so far).",
                meta.kind,
                stamp.generation,
                self.refused,
                extra={"peer_id": caller, "job_id": stamp.job_id},
            )
            raise Refused("stale", f"generation {stamp.generation} is over")
        if stamp.generation > self._stamp.generation:
            raise Refused("busy", f"generation {stamp.generation} has not started here yet")
        # Per sender; another generation of the job may go back to the round of a checkpoint.
        newest = self._newest.get(caller)
        if newest is not None and (stamp.generation, stamp.round, stamp.attempt) < newest:
            raise Refused("stale", f"you have sent {meta.kind} of round {newest[1]} already")
        return stamp

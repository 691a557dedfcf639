"""Between the trainer and its threads: what they have heard, and the update that one of them sends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hypha.errors import PeerUnreachable, Refused
from hypha.executor.bridge.client import BridgeClient, update_waits
from hypha.executor.files.reused import ReusedFiles
from hypha.executor.threads import Threads
from hypha.messages import (
    Contribution,
    Directive,
    Finish,
    PeerRef,
    Peers,
    Plan,
    ReceivedFile,
    Rejoin,
    SendCall,
    UpdateSent,
)

logger = logging.getLogger("hypha.executor.training")

_SEND_RETRY_S = 1.0


class TrainerInbox:
    """What the threads have heard and the trainer looks up. ``changed`` guards and announces all of it."""

    def __init__(self, threads: Threads, parameter_server: PeerRef, generation: int) -> None:
        self.changed = threads.condition()
        self.plan: Plan | None = None
        self.theta: ReceivedFile | None = None
        self.parameter_server = parameter_server
        self.generation = generation
        #: the newest, until the trainer has done what it says
        self.rejoin: Rejoin | None = None
        #: how many generations began with another parameter server
        self.servers = 0
        #: the newest generation before which rounds were lost; what was made in an earlier one is void
        self.lost_before = generation
        self.finished = False
        self.failure: Exception | None = None

    def direct(self, directive: Directive) -> None:
        with self.changed:
            match directive:
                case Plan():
                    self.plan = directive
                case Rejoin():
                    self._rejoin(directive)
                case Finish():
                    self.finished = True
                case _:
                    logger.warning("A training executor does not handle %s.", type(directive).__name__)
            self.changed.notify_all()

    def _rejoin(self, rejoin: Rejoin) -> None:
        if rejoin.generation <= self.generation:
            return  # repeated, as the stream of directives was opened again
        if self.rejoin is not None and self.rejoin.start_over:
            # the trainer has not come to it yet
            rejoin = msgspec.structs.replace(rejoin, start_over=True)
        self.rejoin = rejoin
        self.generation = rejoin.generation
        if rejoin.parameter_server is not None:
            self.parameter_server = rejoin.parameter_server
        self.servers += rejoin.resend
        if rejoin.start_over:
            self.plan = None
            self.lost_before = rejoin.generation

    def take_theta(self, file: ReceivedFile, seen: tuple[int, int, int]) -> ReceivedFile | None:
        """Keep ``file`` if it is newer than what waits, or where nothing does, than the generation, round and
        attempt that are ``seen``. Returns what is superseded, if that is in a file of its own.
        """
        waiting, turn = self.theta, turn_of(file)
        if waiting is not None:
            seen = turn_of(waiting)
        if turn < max(seen, (self.lost_before, -1, -1)):
            logger.warning("A theta that is out of date arrived; it is dropped.")
            return file
        if waiting is not None and (waiting.meta.blake3, seen[1:]) == (file.meta.blake3, turn[1:]):
            # what was asked for since the first one came may be kept
            return file
        self.theta = file
        self.changed.notify_all()
        return waiting if waiting is not None and waiting.path != file.path else None

    def fail(self, failure: Exception) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.changed.notify_all()


def turn_of(file: ReceivedFile) -> tuple[int, int, int]:
    """Of a theta: its generation of the job, its round, and the attempt at that. Without a stamp it is older
    than any other.
    """
    stamp = file.meta.stamp
    return (stamp.generation, stamp.round, stamp.attempt) if stamp is not None else (-1, -1, -1)


@dataclass(frozen=True)
class UpdateToSend:
    """A file, its XXH3 in hex, and what it stands for."""

    path: Path
    xxh3: str
    contribution: Contribution


class UpdateSender:
    """Sends the update of the open round to wherever the parameter server is, and to another one again, until
    told to stop or until the round is lost. In each generation of the job it reports once that it has. Each
    time it is ``sending()`` meanwhile.
    """

    def __init__(
        self,
        bridge: BridgeClient,
        inbox: TrainerInbox,
        update: UpdateToSend,
        reused: ReusedFiles,
        sending: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """It begins."""
        self._bridge = bridge
        self._inbox = inbox
        self._update = update
        self._sending = sending
        self._stopped = False
        self._lost_before = inbox.lost_before

        async def run() -> None:
            try:
                await self._deliver()
            finally:
                reused.give(update.path)

        bridge.threads.start("update", run, inbox.fail)

    def stop(self) -> None:
        """The round is over; the file goes as soon as no call uses it."""
        with self._inbox.changed:
            self._stopped = True
            self._inbox.changed.notify_all()

    async def _deliver(self) -> None:
        told_in = reached = -1
        contribution = self._update.contribution
        while (place := await self._wait(told_in, None)) is not None:
            server, generation, number = place
            try:
                with self._sending() if number != reached else nullcontext():
                    if number != reached:
                        await self._bridge.send(
                            SendCall(
                                resource=Peers(peers=(server,), resource="update"),
                                path=self._bridge.relative(self._update.path),
                                round=contribution.round,
                                samples=contribution.samples,
                                xxh3=self._update.xxh3,
                                generation=generation,
                            )
                        )
                        reached = number
                    told_in = generation
                    self._bridge.report(UpdateSent(contribution=contribution))
            except (Refused, PeerUnreachable) as exc:
                if isinstance(exc, PeerUnreachable) or update_waits(exc):
                    logger.warning("The update of round %d has to wait: %s", contribution.round, exc)
                    await self._wait(generation, _SEND_RETRY_S)
                    continue
                # theta of a later round is on its way, or another generation, or the scheduler has yet to
                # notice
                told_in = generation
                logger.warning("The update of round %d was refused: %s", contribution.round, exc)

    async def _wait(self, told_in: int, timeout_s: float | None) -> tuple[PeerRef, int, int] | None:
        """Wait for another generation of the job than ``told_in``: where to send, in which generation, and to
        which of its parameter servers (counted); None when there is nothing more to send.
        """
        inbox = self._inbox

        def over() -> bool:
            return self._stopped or inbox.lost_before != self._lost_before

        with inbox.changed:
            await inbox.changed.wait_for(lambda: over() or inbox.generation != told_in, timeout_s)
            return None if over() else (inbox.parameter_server, inbox.generation, inbox.servers)

"""Files on their way from one executor to others, each to all its receivers at a time.

A receiver that cannot be reached is tried again by the transfer itself, for a while. A delivery that nobody
needs any more (a newer round goes to the same receiver, the receiver left the job) is given up at once, so
one dead worker does not hold up a round.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import trio

from hypha.errors import NetworkError, PeerUnreachable, Refused
from hypha.messages import Delivery, JobStamp, PeerRef, Sent, TransferMeta
from hypha.node import Transfers
from hypha.runtime import chance
from hypha.telemetry.instruments import BROADCAST_DURATION, UPDATE_SEND_DURATION

logger = logging.getLogger("hypha.worker.send")

#: A receiver that fails is tried again for this long after its first failure.
GIVE_UP_AFTER_S = 60.0


class Deliveries:
    """All deliveries of one executor, by ``transfers``."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        #: in the order in which they were asked for
        self._running: list[_Delivering] = []

    async def deliver(
        self,
        path: Path,
        meta: TransferMeta,
        receivers: Sequence[PeerRef],
        strategy: Literal["all", "random", "one"],
    ) -> tuple[Delivery, ...]:
        """``all``: to every receiver, concurrently. ``one`` and ``random``: to one after the other, in
        order or at random, until one acknowledged.
        """
        if strategy == "all":
            outcomes: dict[str, Delivery] = {}

            async def one(receiver: PeerRef) -> None:
                outcomes[receiver.peer] = await self._deliver(path, meta, receiver)

            async with trio.open_nursery() as nursery:
                for receiver in receivers:
                    nursery.start_soon(one, receiver)
            return tuple(outcomes[receiver.peer] for receiver in receivers)
        order = list(receivers)
        if strategy == "random":
            chance().shuffle(order)
        tried = []
        for receiver in order:
            tried.append(await self._deliver(path, meta, receiver))
            if tried[-1].acknowledged:
                break
        return tuple(tried)

    def keep_only(self, kind: str, peers: Collection[str]) -> None:
        """Give up deliveries of ``kind`` to anybody else."""
        for delivering in self._running:
            if delivering.meta.kind == kind and delivering.peer not in peers:
                delivering.give_up("uninvited", "it takes no part in the job any more")

    async def _deliver(self, path: Path, meta: TransferMeta, receiver: PeerRef) -> Delivery:
        turn, way = turn_of(meta.stamp), (meta.kind, receiver.peer)
        # asked for again because it takes long: a second one would only be in its way
        while same := [one for one in self._running if (one.meta, one.peer) == (meta, receiver.peer)]:
            await same[0].ended.wait()
            if same[0].outcome is not None:
                return same[0].outcome
        for other in self._running:
            if (other.meta.kind, other.peer) == way and turn_of(other.meta.stamp) < turn:
                other.give_up("stale", f"overtaken by round {turn[1]}")
        delivering = _Delivering(meta, receiver.peer)
        self._running.append(delivering)
        began, fields = trio.current_time(), {"peer_id": receiver.peer}
        outcome = Delivery(peer=receiver.peer, acknowledged=True)
        try:
            with delivering.scope:
                await self._transfers.send(receiver, path, meta, GIVE_UP_AFTER_S)
            if delivering.scope.cancelled_caught:
                outcome = delivering.given_up
        except NetworkError as exc:
            if isinstance(exc, Refused):
                if exc.code != "duplicate":  # else it has it
                    logger.warning("%s was refused: %s", meta.name, exc, extra=fields)
                    outcome = delivering.failed(exc.code, exc.reason)
            else:
                logger.error("%s was not delivered: %s", meta.name, exc, extra=fields)
                outcome = delivering.failed("unreachable", str(exc))
        finally:
            self._running.remove(delivering)
            delivering.ended.set()
        delivering.outcome = outcome
        lasted_s = trio.current_time() - began
        duration = {"update": UPDATE_SEND_DURATION, "theta": BROADCAST_DURATION}.get(meta.kind)
        if duration is not None:
            duration.record(lasted_s, status="success" if outcome.acknowledged else "failure")
        if outcome.acknowledged:
            text = "The %s %s was delivered within %.3f s: %d bytes."
            logger.debug(text, meta.kind, meta.name, lasted_s, meta.size, extra=fields)
        return outcome


def settled(deliveries: tuple[Delivery, ...]) -> Sent:
    """What is decided for all receivers. Where nobody acknowledged, raises Refused if anybody refused, else
    PeerUnreachable.
    """
    if any(delivery.acknowledged for delivery in deliveries):
        return Sent(deliveries=deliveries)
    why = "; ".join(f"{delivery.peer}: {delivery.detail}" for delivery in deliveries)
    for delivery in deliveries:
        if delivery.error != "unreachable":
            raise Refused(delivery.error, why, delivery.peer)
    raise PeerUnreachable(deliveries[0].peer, why)


def turn_of(stamp: JobStamp | None) -> tuple[int, int, int]:
    """A later one overtakes: the generation of the job, the round in it, the attempt at that."""
    return (0, 0, 0) if stamp is None else (stamp.generation, stamp.round, stamp.attempt)


class _Delivering:
    def __init__(self, meta: TransferMeta, peer: str) -> None:
        self.meta = meta
        self.peer = peer
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        #: None until it has ended, and when whoever asked for it did not wait
        self.outcome: Delivery | None = None
        #: valid when ``scope`` was cancelled
        self.given_up = Delivery(peer=peer, acknowledged=False)

    def give_up(self, error: str, detail: str) -> None:
        self.given_up = self.failed(error, detail)
        self.scope.cancel()

    def failed(self, error: str, detail: str) -> Delivery:
        return Delivery(peer=self.peer, acknowledged=False, error=error, detail=detail)

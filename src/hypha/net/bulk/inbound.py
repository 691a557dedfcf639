"""Transfers on their way in: what is known of each, who takes it, and which one gives way to which."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.errors import Refused
from hypha.messages import TransferMeta
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.wire import Verdict
from hypha.node import Arrived, Gate

#: Less than this within ``STILL_S`` of ``turns.py`` is a trickle.
TRICKLE_BYTES = 128 << 10


@dataclass(frozen=True, eq=False)
class Acceptor:
    """Takes files of one kind (of one job) that others send."""

    gate: Gate
    arrived: Arrived


@dataclass(eq=False)
class Inbound:
    """One attempt to receive a file, over one connection."""

    token: str
    caller: str
    meta: TransferMeta
    destination: Path
    #: who takes it; None where this node has asked for it
    acceptor: Acceptor | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    #: it has a place here, and it is its sender that owes something
    has_turn: bool = False
    link: BulkConnection | None = None
    #: all bytes are here; it is being verified and taken, and must not be disturbed
    settling: bool = False
    #: of which operation of its sender it is part
    traceparent: str | None = None
    #: what its sender is told in the end
    verdict: Verdict | None = None

    @property
    def log_fields(self) -> dict[str, str]:
        stamp = self.meta.stamp
        return {"peer_id": self.caller} | ({"job_id": stamp.job_id} if stamp is not None else {})

    @property
    def arrived(self) -> bool:
        return self.verdict is not None and self.verdict.outcome == "ok"

    def moved(self) -> tuple[int, int]:
        """What changes while its place is in use: a trickle fills nothing, and its place is lent."""
        return (0, 0) if self.link is None else (id(self.link), self.link.heard // TRICKLE_BYTES)

    async def end(self) -> None:
        """Cut it, unless it is here already, and return when it has ended."""
        if not self.settling:
            self.scope.cancel()
        await self.ended.wait()

    def heard(self) -> tuple[int, int]:
        """What changes while something comes: the connection, and the bytes that came over it."""
        return (id(self.link), self.link.heard) if self.link is not None else (0, 0)


class Acceptance:
    """Who takes what others send, and what is on its way in, which no two write to one place."""

    def __init__(self) -> None:
        self._acceptors: dict[tuple[str, str | None], Acceptor] = {}
        #: what is on its way in
        self.by_token: dict[str, Inbound] = {}

    @property
    def under_way(self) -> int:
        return len(self.by_token)

    @property
    def takes(self) -> bool:
        """Whether anybody takes files."""
        return bool(self._acceptors)

    def accept(self, kind: str, job_id: str | None, gate: Gate, arrived: Arrived) -> Callable[[], None]:
        key = (kind, job_id)
        if key in self._acceptors:
            raise ValueError(f"files of kind {kind!r} of job {job_id!r} are accepted by somebody already")
        acceptor = self._acceptors[key] = Acceptor(gate, arrived)

        def stop() -> None:
            if self._acceptors.get(key) is acceptor:
                del self._acceptors[key]
            for inbound in list(self.by_token.values()):
                # ``arrived`` itself may be the one that stops
                if inbound.acceptor is acceptor and not inbound.settling:
                    inbound.scope.cancel()

        return stop

    def acceptor_of(self, meta: TransferMeta) -> Acceptor:
        """Refused where nobody takes such files."""
        job_id = meta.stamp.job_id if meta.stamp is not None else None
        acceptor = self._acceptors.get((meta.kind, job_id)) or self._acceptors.get((meta.kind, None))
        if acceptor is None:
            raise Refused("not-found", f"nobody here takes files of kind {meta.kind!r} for this job")
        return acceptor

    @contextlib.contextmanager
    def tracked(self, inbound: Inbound) -> Iterator[None]:
        """The transfer is under way meanwhile."""
        self.by_token[inbound.token] = inbound
        try:
            yield
        finally:
            inbound.ended.set()
            if self.by_token.get(inbound.token) is inbound:
                del self.by_token[inbound.token]

    async def claim(self, inbound: Inbound) -> None:
        """See that nothing else writes to its destination: a sender that starts anew ends its own earlier
        transfer. Refused.
        """
        while others := [
            one
            for one in self.by_token.values()
            if one.destination == inbound.destination and one is not inbound
        ]:
            if others[0].caller != inbound.caller or others[0].settling:
                raise Refused("busy", f"{others[0].meta.name} is being received already")
            await others[0].end()

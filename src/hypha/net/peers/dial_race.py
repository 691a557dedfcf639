"""Addresses of one peer that are tried at the same time, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio
from opentelemetry.trace import Span

from hypha.errors import NetworkError
from hypha.net.peers.reasons import failure_of, root_of, says_refused
from hypha.net.peers.shut_out import is_of_certificate


@dataclass
class DialRace:
    """Addresses being tried at the same time; ``scope`` ends them all when one has won."""

    scope: trio.CancelScope
    #: what is tried, and how that ends, is noted here
    span: Span
    pending: int = 0
    progress: trio.Event = field(default_factory=trio.Event)
    failures: list[str] = field(default_factory=list)
    #: those of them that were known when relays were tried
    direct: list[str] = field(default_factory=list)
    #: of the direct addresses that failed, did each refuse the connection?
    refused: list[bool] = field(default_factory=list)
    met: bool = False
    #: whether the peer itself refuses this node's certificate, or this node the peer's
    shut_out: bool = False
    #: why the last address failed, in the words that failures are counted by
    reason: str = "unreachable"

    def note(self, what: str, address: str, reason: str = "") -> None:
        """Note in the span what became of an address."""
        more = {"hypha.reason": reason} if reason else {}
        self.span.add_event(what, {"network.peer.address": address, **more})

    def failed(self, address: str, exc: NetworkError) -> None:
        """An address did not lead there."""
        self.failures.append(f"{address}: {exc}")
        self.refused.append(says_refused(exc))
        self.reason = failure_of(exc)
        self.shut_out = self.shut_out or is_of_certificate(root_of(exc))
        self.note("failed", address, str(exc))
        self.pending -= 1
        self.progress.set()
        self.progress = trio.Event()

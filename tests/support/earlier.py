"""Nodes of earlier versions.

A worker of a version that stated none: its offers are, byte for byte, what such workers sent (see
``tests/test_recorded.py``), and it passes over the fields of requests that came later. A node whose bulk
plane knows no ``WantFile`` agrees on the ALPN of such nodes, and has no such streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
from libp2p.custom_types import TProtocol

from hypha.config.offers import OfferConfig
from hypha.features import Abilities
from hypha.messages import PeerRef, WorkerRequest
from hypha.net import Libp2pNode
from hypha.net.bulk.wire import WANT_ALPN, WANT_PROTOCOL
from hypha.rules.leases import Lease
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import ArbiterAction
from hypha.worker.leasing.service import LeaseService
from hypha.worker.leasing.vetting import WorkerCapacity


def without_wants(node: Libp2pNode) -> None:
    """Make ``node`` one that neither asks for files over bulk connections nor is asked so."""
    identity = node.identity
    real_ones = {"server_context": identity.server_context, "client_context": identity.client_context}
    for name, real in real_ones.items():

        def context(alpn: tuple[str, ...] = (), real: Callable[..., Any] = real) -> Any:
            return real(tuple(one for one in alpn if one != WANT_ALPN))

        setattr(identity, name, context)
    node._host.get_mux().handlers.pop(TProtocol(WANT_PROTOCOL), None)


class EarlierLeaseService(LeaseService):
    """Its leases."""

    def receive(
        self, publisher: str, request: WorkerRequest, received_in: str | None = None, reached: bool = True
    ) -> list[ArbiterAction]:
        """As its decoder leaves the request."""
        plain = msgspec.structs.replace(request, version="", needs=())
        return super().receive(publisher, plain, received_in, reached)


def earlier_lease_service(
    capacity: WorkerCapacity,
    terms: OfferConfig,
    worker: Callable[[], PeerRef],
    on_expired: Callable[[Lease], None],
) -> EarlierLeaseService:
    """The lease service of such a worker."""
    return EarlierLeaseService(Arbiter(replace(capacity, abilities=Abilities()), terms, worker), on_expired)

"""Workers of a version that stated none.

Their offers are, byte for byte, what such workers sent (see ``tests/test_recorded.py``), and they pass over
the fields of requests that came later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from hypha.config.offers import OfferConfig
from hypha.features import Abilities
from hypha.messages import PeerRef, WorkerRequest
from hypha.rules.leases import Lease
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.events import ArbiterAction
from hypha.worker.leasing.service import LeaseService
from hypha.worker.leasing.terms import WorkerCapacity


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

"""How schedulers ask for workers, and workers offer, lease and take back what they have."""

from __future__ import annotations

from hypha.messages.values import (
    ExecutorDescriptor,
    FeatureNames,
    Id,
    Message,
    PeerRef,
    Resources,
    VersionName,
)

#: Gossip topic on which schedulers ask for workers.
WORKER_TOPIC = "hypha/worker"


class WorkerRequest(Message):
    """A scheduler wants ``count`` more workers with ``resources`` each. Offers are to reach it within
    ``offer_within_s`` of hearing this. ``dataset`` lets a worker prefer what it has cached. ``version`` is
    the scheduler's, ``needs`` the features (:mod:`hypha.features`) without which a worker need not offer.
    """

    request_id: Id
    scheduler: PeerRef
    resources: Resources
    executor: ExecutorDescriptor
    count: int
    bid: float
    offer_within_s: float
    dataset: str | None = None
    version: VersionName = ""
    needs: FeatureNames = ()


class WorkerOffer(Message):
    """A worker holds ``resources`` for the scheduler under a temporary lease of ``expires_in_s``. ``version``
    and ``features`` (:mod:`hypha.features`) are the worker's; without them it is older than these fields.
    """

    lease_id: Id
    request_id: Id
    worker: PeerRef
    resources: Resources
    price: float
    expires_in_s: float
    version: VersionName = ""
    features: FeatureNames = ()


class RenewLease(Message):
    """First renewal = acceptance."""

    lease_id: Id


class LeaseRenewed(Message):
    """The lease now lives ``expires_in_s`` from when the answer was sent. ``contended``: other schedulers ask
    for what it holds, ``outranked``: one of them for longer than its owner. It is not ended for them.
    """

    lease_id: Id
    expires_in_s: float
    contended: bool = False
    outranked: bool = False


class ReleaseLease(Message):
    """A courtesy: the resources may go to somebody else before the lease expires."""

    lease_id: Id


class WorkerLeaving(Message):
    """A worker tells a scheduler that it ends in ``left_s`` seconds, and with it what runs under its lease:
    until then the open round's update can be sent, and another worker looked for. Repeated once a second,
    each time with what is left. With ``left_s = 0`` the lease is handed back now: it is over at the worker. A
    scheduler older than this message refuses it, and notices the end as it ever did.
    """

    lease_id: str
    left_s: float
    reason: str = ""

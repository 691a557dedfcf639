"""The events and actions of :mod:`hypha.worker.leasing.arbiter`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from hypha.features import Abilities
from hypha.messages import ExecutorDescriptor, PeerRef, Resources, WorkerOffer, WorkerRequest
from hypha.rules.leases import Bind, Denied, Drained, Freed, Granted, Hold, LeaseEnded, Release, Tick

# --- in -----------------------------------------------------------------------------------------------


class RequestReceived(Struct, frozen=True, tag="Heard"):
    """``request`` was published by the authenticated ``publisher``. Unless it is ``reached``, a connection to
    it is being made, and :class:`Reached` follows. ``cached``: slices of its dataset are here.
    """

    publisher: str
    request: WorkerRequest
    reached: bool = True
    cached: bool = False


class Reached(Struct, frozen=True, tag=True):
    """Whether a connection to the authenticated ``scheduler`` could be made."""

    scheduler: str
    reached: bool


class OfferFailed(Struct, frozen=True, tag=True):
    """The offer was refused, or could not be delivered in time (``undelivered``)."""

    lease_id: str
    reason: str
    undelivered: bool = False


class RenewAsked(Struct, frozen=True, tag=True):
    """The authenticated ``caller`` renews, or by its first renewal accepts."""

    lease_id: str
    caller: str


class Close(Struct, frozen=True, tag=True):
    """Offer nothing any more; leases go on (a worker that is about to stop)."""


class Reopen(Struct, frozen=True, tag=True):
    """Make offers again, after :class:`Close`."""


#: of a table of the configuration
Value = str | float | bool | list[str] | None


class ArbiterBegan(Struct, frozen=True, tag=True):
    """What an arbiter was made from: the first entry of its journal."""

    total: Resources
    executors: tuple[ExecutorDescriptor, ...]
    terms: dict[str, str | float | bool | dict[str, Value] | None]
    abilities: Abilities = Abilities()
    gpus: tuple[float, ...] = ()


ArbiterEvent = (
    RequestReceived
    | Reached
    | OfferFailed
    | RenewAsked
    | Release
    | Bind
    | Hold
    | Drained
    | Tick
    | Close
    | Reopen
)


# --- out ------------------------------------------------------------------------------------------------


class SendOffer(Struct, frozen=True, tag=True):
    """Bring ``offer`` to ``scheduler`` before ``before``, or report :class:`OfferFailed`."""

    scheduler: PeerRef
    offer: WorkerOffer
    before: float


#: why a request gets no offer
Cause = Literal["price", "resources", "executor", "features", "duplicate", "closed", "other"]


class Ignored(Struct, frozen=True, tag=True):
    """No offer for this request, and why: in words, and by ``cause``."""

    request_id: str
    scheduler: str
    reason: str
    cause: Cause = "other"


ArbiterAction = SendOffer | Ignored | Granted | Denied | LeaseEnded | Freed

"""What a worker has to offer, and on what terms."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hypha.config.section import Section


class ResourcesConfig(Section):
    """What the worker has to offer: cores, and GB of the rest. No more than there is (`detect_resources`)."""

    cpu: float = Field(default=1.0, ge=0)
    memory: float = Field(default=8.0, ge=0)
    gpu: float = Field(default=0.0, ge=0)
    storage: float = Field(default=20.0, ge=0)


#: prices and bids are numbers up to this; what they count is between schedulers and owners
MAX_PRICE = 1e12


class UtilizationConfig(Section):
    """With ``offer.strategy = "utilization"``: the price asked follows the load, which is the share of the
    worker's most used resource that is leased. It moves by ``step`` every ``every_s`` while the load is
    ``high`` or more (up) or ``low`` or less (down), and stays where it is in between.
    """

    low: float = Field(default=0.3, ge=0, le=1)
    high: float = Field(default=0.8, gt=0, le=1)
    step: float = Field(default=0.25, ge=0.01, le=10)
    """0.25: a quarter dearer each time, and back"""
    every_s: float = Field(default=30.0, ge=0.1)
    least: float = Field(default=0.5, gt=0, le=1)
    """as multiples of ``offer.price``; never below ``offer.floor``"""
    most: float = Field(default=4.0, ge=1, le=1000)


class AffinityConfig(Section):
    """With ``offer.strategy = "affinity"``: for whom and for what this worker works at a lower price."""

    schedulers: list[str] = []
    """PeerIDs of schedulers"""
    cached: bool = True
    """jobs on a dataset of which slices are in this worker's cache"""
    preference: float = Field(default=1.5, ge=1, le=1000)
    """their bids count as so many times as high as they are, and so much less is asked of them"""


class OfferConfig(Section):
    """On what terms. ``price`` is asked for one lease, whatever it reserves; bids below ``floor`` are not
    answered. docs/prices.md has the rules.
    """

    price: float = Field(default=1.0, ge=0, le=MAX_PRICE)
    floor: float = Field(default=0.0, ge=0, le=MAX_PRICE)
    strategy: Literal["flexible", "whole", "utilization", "affinity"] = "flexible"
    """flexible: exactly what was asked for; whole: to training jobs all that is free, for larger batches;
    utilization: as flexible, at a price that follows the load; affinity: as flexible, cheaper for some
    """
    counter: bool = True
    """a bid below the price is answered with an offer at the price; false: not at all"""
    ageing_s: float | None = Field(default=60.0, ge=0.1)
    """a request that has waited for so long here counts as if it had bid twice as much (three times after
    twice as long ...), so that nobody waits for ever; ``None``: bids alone count
    """
    keep_after_s: float | None = Field(default=600.0, ge=0.1)
    """for a request that has waited for so long here, and needs more than is free, what becomes free is
    kept, so that smaller ones do not overtake it for ever; ``None``: never
    """
    request_window_s: float = Field(default=0.2, ge=0)
    temporary_lease_s: float = Field(default=5.0, gt=0)
    """how long an offer is good; twice tuning.liveness.round_trip_s at least"""
    lease_s: float = Field(default=30.0, gt=0)
    """a lease that is not renewed is over after so long; four times tuning.liveness.round_trip_s at least.
    More rides out interruptions of a quarter of it, less notices sooner that a scheduler has died
    """
    utilization: UtilizationConfig = UtilizationConfig()
    affinity: AffinityConfig = AffinityConfig()

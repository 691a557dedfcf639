"""What a job's time went to, as plain values: the report that people and monitoring see."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from hypha.messages import ExecutorClass

FailureReason = Literal["lease", "unreachable", "executor", "hang", "refused", "dropped", "other"]


class Recovery(Struct, frozen=True):
    """A failure of a worker or an executor, and how the job got over it.

    ``at_s``: when it was noticed, since the scheduler began. ``detect_s``: from the last sign of life until
    then. ``replace_s``: from then until the place trained again, or the parameter server was ready.
    ``catch_up_s``: from then until the next applied round that holds the place's update (any round, after a
    parameter server). None while that has not happened.
    """

    kind: ExecutorClass
    peer: str
    reason: FailureReason
    at_s: float
    detect_s: float
    replace_s: float | None = None
    catch_up_s: float | None = None


class GoodputReport(Struct, frozen=True):
    """Where the time of all worker places went since this scheduler began: ``goodput_s`` and the sum of
    ``badput_s`` make ``places * wall_s``. What was before a restart of the scheduler is not in it, as no
    monotonic clock lasts that long; only ``samples`` are those of the whole job.

    ``goodput_s``: worker seconds of training whose samples count. ``pending_s`` of them are of the open
    round, and may still be lost; so may rounds after the last checkpoint. ``samples_per_s``: samples of
    rounds that were applied since the scheduler began and count, by wall clock. ``calm_samples_per_s``: the
    median rate of the newest rounds to which every place contributed and in which nothing failed; None before
    there was one.
    ``runtime``: ``samples_per_s`` over that. ``scheduling``: leased over wanted worker seconds.
    """

    wall_s: float
    places: int
    goodput_s: float
    pending_s: float
    badput_s: dict[str, float]
    samples: int
    samples_per_s: float
    calm_samples_per_s: float | None
    runtime: float | None
    scheduling: float
    recoveries: tuple[Recovery, ...] = ()

    @property
    def share(self) -> float:
        """Goodput over all worker seconds, 0 to 1."""
        total_s = self.places * self.wall_s
        return self.goodput_s / total_s if total_s > 0 else 0.0


class FailureNoticed(Struct, frozen=True, tag=True):
    """An executor of ``kind``, or its worker, was lost or has failed."""

    kind: ExecutorClass
    reason: FailureReason


class RecoveryStep(Struct, frozen=True, tag=True):
    """A step of getting over a failure, that took ``seconds``."""

    phase: Literal["detect", "replace", "catch-up"]
    seconds: float


GoodputNews = FailureNoticed | RecoveryStep

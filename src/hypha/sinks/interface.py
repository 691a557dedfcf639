"""What the scheduler tells the process of a metric sink, which replies to each with a JSON string: what went
wrong, empty when it was done.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Destination(Struct, frozen=True):
    """One ``[[scheduler.sinks]]``. ``name`` is the run's name in the tool; ``directory`` is absolute."""

    type: str
    project: str
    name: str
    directory: str
    url: str | None = None
    token: str | None = None
    offline: bool = False


class RunInfo(Struct, frozen=True):
    """The job: ``job_id`` stays the same when the job is resumed. ``settings`` are its hyperparameters."""

    job_id: str
    settings: dict[str, Any] = {}


class RoundValues(Struct, frozen=True):
    """The figures of one applied round. ``round`` is how many rounds have been applied by then; it goes back
    when the job goes on from a checkpoint. ``values`` are of the whole job, ``workers`` by PeerID; all are
    finite. ``at`` is the time of day, in seconds since 1970.
    """

    round: int
    at: float
    values: dict[str, float]
    workers: dict[str, dict[str, float]] = {}

    def flat(self) -> dict[str, float]:
        """All of them; a worker's loss is ``loss/<PeerID>``, so that tools show it beside the mean."""
        return self.values | {
            f"{name}/{worker}": value
            for worker, values in self.workers.items()
            for name, value in values.items()
        }


class Begin(Struct, frozen=True):
    """The first thing a sink's process is told."""

    destination: Destination
    run: RunInfo

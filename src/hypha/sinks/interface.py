"""What a metric sink is told, and what it has to be able to do."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

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


class Reply(Struct, frozen=True):
    """What it says to each thing; ``error`` is empty when that was done."""

    error: str = ""


class MetricSink(Protocol):
    """May block, and may raise anything: it is started again then, and told the same round once more."""

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Begin the run, or go on with it if it is there."""

    def record(self, values: RoundValues) -> None:
        """Write one round; what is written is safe with the tool when this returns, as far as it allows."""

    def close(self) -> None:
        """End the run; called once, when it was opened."""


def library(name: str) -> Any:
    """The module ``name`` of an optional package. Raises :class:`ImportError`."""
    return importlib.import_module(name)


def own_directory(destination: Destination) -> Path:
    """The sink's directory, made. Raises :class:`OSError`."""
    path = Path(destination.directory)
    path.mkdir(parents=True, exist_ok=True)
    return path

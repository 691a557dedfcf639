"""The figures of each applied round, for metric sinks: read from what the round machine decided and from the
job's snapshots. Neither knows that anybody reads them.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from hypha.config.job import JobConfig
from hypha.config.models import SchedulerConfig
from hypha.journal import Journal, JournalEntry
from hypha.messages import LedgerRound
from hypha.runtime import wall_time
from hypha.scheduler.rounds.events import GenerationBegan, Record
from hypha.scheduler.rounds.policy import Start
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.sinks import Destination, RoundValues, RunInfo, SinkProcess

#: a job that is done waits so long for its sinks; one that is to stop has promised to end soon
_CLOSE_S = 4.0
_STOP_S = 0.4
#: of a job's keys, those that researchers compare runs by; none of them holds a secret
_SETTINGS: dict[str, Any] = {
    "model": {"type", "repository", "revision", "entrypoint", "seed"},
    "dataset": {"dataset", "shuffle"},
    "rounds": True,
    "inner_optimizer": True,
    "outer_optimizer": True,
    "schedule": True,
    "resources": {"num_workers", "min_workers"},
    "precision": True,
    "update_encoding": True,
    "seed": True,
}


def settings_of(job: JobConfig, start: Start) -> dict[str, Any]:
    """By which runs are compared; with what was chosen where the configuration leaves it open."""
    settings = job.model_dump(mode="json", include=_SETTINGS)
    if start.optimizer is not None:
        settings["outer_optimizer"] |= msgspec.structs.asdict(start.optimizer)
    return settings


class Recording:
    """Feeds sinks: :meth:`listen` to the journal, :meth:`see` snapshots."""

    def __init__(self, config: SchedulerConfig, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._job = config.scheduler.job
        root = config.state_dir / self._job.name / "sinks"
        self._destinations = [
            Destination(
                type=sink.type,
                project=sink.project,
                name=sink.name or self._job.name,
                directory=str((sink.directory or root / sink.type).absolute()),
                url=sink.url,
                token=sink.token,
                offline=sink.offline,
            )
            for sink in config.scheduler.sinks
        ]
        self.sinks: list[SinkProcess] = []
        self._waiting: list[tuple[LedgerRound, float]] = []

    def listen(self, entry: JournalEntry) -> None:
        """The sinks are opened when a job's first generation begins."""
        if isinstance(entry.event, GenerationBegan) and not self.sinks:
            start = entry.event.start
            run = RunInfo(start.job_id, settings_of(self._job, start))
            self.sinks = [SinkProcess(one, run) for one in self._destinations]
            for sink in self.sinks:
                self._nursery.start_soon(sink.run)
        self._waiting += [(one.entry, wall_time()) for one in entry.actions if isinstance(one, Record)]

    def see(self, snapshot: JobSnapshot) -> None:
        """Send the rounds that were applied since the last snapshot, with what this one knows."""
        for entry, at in self._waiting:
            values = RoundValues(
                round=entry.round + 1,
                at=at,
                values=_finite(self._of_job(entry, snapshot)),
                workers=_of_workers(entry),
            )
            for sink in self.sinks:
                sink.put(values)
        self._waiting.clear()

    def _of_job(self, entry: LedgerRound, snapshot: JobSnapshot) -> dict[str, float]:
        values = {
            "loss": entry.loss,
            "samples": float(snapshot.samples),
            "round_samples": float(entry.samples),
            "round_seconds": entry.duration_s,
            "update_norm": entry.update_norm,
            "workers": float(len(entry.contributors)),
            "epoch": float(snapshot.epoch),
        }
        if entry.duration_s > 0:
            values["samples_per_second"] = entry.samples / entry.duration_s
        if snapshot.goodput is not None:
            values["goodput"] = snapshot.goodput.samples_per_s
        if self._job.schedule.type == "constant":
            values["learning_rate"] = self._job.inner_optimizer.learning_rate
        return values


def _of_workers(entry: LedgerRound) -> dict[str, dict[str, float]]:
    found = {part.worker: {"loss": part.loss, "samples": float(part.samples)} for part in entry.contributors}
    for one in entry.updates:
        if one.worker in found:
            found[one.worker]["update_norm"] = one.norm
            if one.cosine is not None:
                found[one.worker]["update_cosine"] = one.cosine
    return {worker: _finite(figures) for worker, figures in found.items()}


def _finite(values: dict[str, float]) -> dict[str, float]:
    """JSON knows no other numbers."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


@asynccontextmanager
async def recording(config: SchedulerConfig, journal: Journal) -> AsyncIterator[Recording | None]:
    """Feed the sinks of ``config`` meanwhile; nothing at all where it has none."""
    if not config.scheduler.sinks:
        yield None
        return
    async with trio.open_nursery() as nursery:
        feeding = Recording(config, nursery)
        journal.listeners.append(feeding.listen)
        try:
            yield feeding
        finally:
            journal.leave(feeding.listen)
            stopped = trio.current_effective_deadline() == -math.inf
            for sink in feeding.sinks:
                sink.close(_STOP_S if stopped else _CLOSE_S)

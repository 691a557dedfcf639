"""The scheduler: the only authority on a job, from finding workers to the published model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypha.scheduler.status.snapshot import JobSnapshot, WorkerSnapshot

if TYPE_CHECKING:
    from hypha.scheduler.durable.ledger import read_ledger
    from hypha.scheduler.job.ending import finished_job
    from hypha.scheduler.job.run import run_job
    from hypha.scheduler.job.states import JobResult, Observation

__all__ = [
    "JobResult",
    "JobSnapshot",
    "Observation",
    "WorkerSnapshot",
    "finished_job",
    "read_ledger",
    "run_job",
]

#: what needs the network, or the ledger, is imported by who asks for it: looking at a job takes neither
_LATER = {
    "JobResult": "job.states",
    "Observation": "job.states",
    "finished_job": "job.ending",
    "read_ledger": "durable.ledger",
    "run_job": "job.run",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

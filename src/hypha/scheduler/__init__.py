"""The scheduler: the only authority on a job, from finding workers to the published model."""

from hypha.scheduler.context import JobResult
from hypha.scheduler.finished import finished_job
from hypha.scheduler.job import run_job
from hypha.scheduler.ledger import read_ledger
from hypha.scheduler.snapshot import JobSnapshot, WorkerSnapshot

__all__ = ["JobResult", "JobSnapshot", "WorkerSnapshot", "finished_job", "read_ledger", "run_job"]

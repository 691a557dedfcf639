"""What every part of a running job uses, and what the job comes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypha.config.models import JobConfig
from hypha.journal import Journal
from hypha.node import Node
from hypha.scheduler.durable.export import Output
from hypha.scheduler.durable.replicas import Replicas
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.handlers import ServedDirectory
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds.policy import Rules
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.scheduler.status.view import Progressed


@dataclass(frozen=True)
class JobResult:
    """A finished job; ``output`` is where the model is."""

    name: str
    job_id: str
    rounds: int
    samples: int
    loss: float | None
    theta: str
    output: str
    ledger: Path
    wall_s: float
    workers: int


@dataclass(frozen=True)
class JobContext:
    """One run of a job, the same from its beginning to its end. ``began`` is when, of trio's clock."""

    config: JobConfig
    rules: Rules
    node: Node
    state: StateDirectory
    output: Output
    directories: dict[str, ServedDirectory]
    pool: Pool
    replicas: Replicas
    progressed: Progressed
    journal: Journal
    traces: RoundTraces
    began: float

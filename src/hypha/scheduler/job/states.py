"""What every part of a running job uses, what is seen of it, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.config.job import JobConfig
from hypha.errors import HyphaError
from hypha.journal import Journal
from hypha.node import Node
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.descriptions import searches_of
from hypha.scheduler.durable.export import Output
from hypha.scheduler.durable.replicas import Replicas
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.handlers import ServedDirectory
from hypha.scheduler.leasing.events import SearchTimes
from hypha.scheduler.leasing.pool import Pool
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import Rules
from hypha.scheduler.status.round_traces import RoundTraces
from hypha.scheduler.status.snapshot import JobSnapshot, Progressed

Observer = Callable[[JobSnapshot], None]


@dataclass(frozen=True)
class Observation:
    """Who observes a job while it runs: ``observe`` gets a snapshot a few times a second, ``journal`` is the
    one of all machines, ``trace_ratio`` the share of rounds that are traced, ``None`` where nothing is.
    """

    observe: Observer | None = None
    journal: Journal = field(default_factory=Journal)
    trace_ratio: float | None = None


@dataclass(frozen=True)
class JobContext:
    """One run of a job, the same from its beginning to its end. ``output`` is where the model goes; workers
    fetch files from ``directories``, by kind. ``began`` is of trio's clock.
    """

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

    @classmethod
    def create(
        cls,
        config: JobConfig,
        node: Node,
        state: StateDirectory,
        observation: Observation,
        output: Output,
        directories: dict[str, ServedDirectory],
    ) -> JobContext:
        """Of a run that begins now; ``node`` is connected or will be."""
        resources, journal = config.resources, observation.journal
        times = SearchTimes(
            offer_deadline_s=resources.offer_deadline_s, yield_after_s=resources.yield_after_s
        )
        traces = RoundTraces(observation.trace_ratio)
        return cls(
            config=config,
            rules=Rules.from_config(config),
            node=node,
            state=state,
            output=output,
            directories=directories,
            pool=Pool(node, searches_of(config), times, journal=journal, traces=traces),
            replicas=Replicas(node, config.name),
            progressed=Progressed(),
            journal=journal,
            traces=traces,
            began=trio.current_time(),
        )


@dataclass
class JobStage:
    """What is known of a job now; ``step`` is what is done while there is no machine."""

    step: str
    dataset: ServedDataset | None = None
    machine: RoundMachine | None = None


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


#: None while the job runs, and after it was cancelled
Outcome = JobResult | HyphaError | None

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


class JobContext:
    """One run of a job that begins now, the same to its end; ``node`` is connected or will be. ``output`` is
    where the model goes; workers fetch files from ``directories``, by kind. ``began`` is of trio's clock.
    """

    def __init__(
        self,
        config: JobConfig,
        node: Node,
        state: StateDirectory,
        observation: Observation,
        output: Output,
        directories: dict[str, ServedDirectory],
    ) -> None:
        resources = config.resources
        times = SearchTimes(
            offer_deadline_s=resources.offer_deadline_s, yield_after_s=resources.yield_after_s
        )
        self.config = config
        self.rules = Rules.from_config(config)
        self.node = node
        self.state = state
        self.output = output
        self.directories = directories
        self.journal = observation.journal
        self.traces = RoundTraces(observation.trace_ratio)
        self.pool = Pool(node, searches_of(config), times, journal=self.journal, traces=self.traces)
        self.replicas = Replicas(node, config.name)
        self.progressed = Progressed()
        self.began = trio.current_time()


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

"""What every part of a running job uses, and the states that a run goes through.

A run is :class:`Preparing` while its dataset is looked for and its ledger is opened, :class:`Opened` when
both are there, and then at work (:class:`hypha.scheduler.job.working.WorkingJob`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.config.job import JobConfig
from hypha.errors import HyphaError
from hypha.features import needs
from hypha.journal import Journal
from hypha.messages import PeerRef
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.descriptions import searches_for
from hypha.scheduler.durable.export import Output, output_for
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import Replicas
from hypha.scheduler.durable.starts import Generation, described
from hypha.scheduler.durable.state_directory import CheckpointStore, StateDirectory
from hypha.scheduler.handlers import ServedDirectory, served_directories
from hypha.scheduler.leasing.events import LeaseGained, SearchTimes
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
class JobFiles:
    """Where the trained model goes, and the ``directories`` that workers fetch files from, by kind."""

    output: Output
    directories: dict[str, ServedDirectory]

    @classmethod
    async def checked(cls, config: JobConfig) -> JobFiles:
        """As the configuration names them. Raises :class:`HyphaError` where one cannot be used."""
        output = output_for(config.output, config.output_token)
        await in_thread(output.check)
        return cls(output, await in_thread(served_directories, config))


@dataclass(frozen=True)
class JobContext:
    """One run of a job, the same from its beginning to its end. ``began`` is when, of trio's clock."""

    config: JobConfig
    rules: Rules
    node: Node
    state: StateDirectory
    files: JobFiles
    pool: Pool
    replicas: Replicas
    progressed: Progressed
    journal: Journal
    traces: RoundTraces
    began: float

    @classmethod
    def create(
        cls, config: JobConfig, node: Node, state: StateDirectory, files: JobFiles, observation: Observation
    ) -> JobContext:
        """Of a run that begins now; ``node`` is connected or will be."""
        resources, journal = config.resources, observation.journal
        times = SearchTimes(
            offer_deadline_s=resources.offer_deadline_s, yield_after_s=resources.yield_after_s
        )
        traces = RoundTraces(observation.trace_ratio)
        train, aggregate = described(config, PeerRef(peer=""), "")
        searches = searches_for(
            resources,
            config.dataset.dataset,
            {"train": needs(train), "aggregate": needs(aggregate)},
            config.rounds.max_batch_size if config.rounds.batch_size is None else 1,
        )
        return cls(
            config=config,
            rules=Rules.from_config(config),
            node=node,
            state=state,
            files=files,
            pool=Pool(node, searches, times, journal=journal, traces=traces),
            replicas=Replicas(node, config.name),
            progressed=Progressed(),
            journal=journal,
            traces=traces,
            began=trio.current_time(),
        )


class JobStage:
    """What is known of a job in any of its states; ``step`` is what is done while there is no machine."""

    step: str
    dataset: ServedDataset | None
    machine: RoundMachine | None


@dataclass(frozen=True)
class Preparing(JobStage):
    """The first state of a run."""

    step: str
    dataset = machine = None


@dataclass(frozen=True)
class Opened(JobStage):
    """The second one: the dataset is known, the ledger open, and ``generation`` begins. ``left`` are leases
    of an earlier scheduler of the job, under which executors may run; those ``of_another`` job go back.
    """

    dataset: ServedDataset
    ledger: Ledger
    generation: Generation
    store: CheckpointStore
    left: tuple[LeaseGained, ...] = ()
    of_another: tuple[LeaseGained, ...] = ()
    step = "reading the job's state"
    machine = None


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

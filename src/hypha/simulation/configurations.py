"""The configurations of the programs of a simulated world, by its scenario."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypha.config.job import (
    DEFAULT_EXECUTOR,
    CheckpointConfig,
    DatasetRef,
    InnerOptimizerConfig,
    JobConfig,
    JobResourcesConfig,
    ModelConfig,
    NeedsConfig,
    PriceConfig,
    RoundsConfig,
    ScheduleConfig,
)
from hypha.config.models import (
    AllowConfig,
    CacheConfig,
    DataConfig,
    DatasetConfig,
    ExecutorConfig,
    PreemptionConfig,
    SchedulerConfig,
    SchedulerSection,
    StorageConfig,
    WorkerConfig,
)
from hypha.config.offers import OfferConfig, ResourcesConfig
from hypha.config.tuning import WorkerLimitsConfig
from hypha.simulation.scenario import Scenario, gives_notice

DATASET = "rows"
JOB = "job"
#: a file that tells a worker that its machine is taken away, and how often it looks for that
NOTICE, _POLL_S = "notice", 0.5
ENTRYPOINT = "hypha.executor.toy:ToyModel"

#: files that nobody reads here: nodes are given
_IDENTITY = {"cert_pem": Path("cert.pem"), "key_pem": Path("key.pem"), "trust_pem": Path("trust.pem")}


def data_config(gateways: Sequence[str], directory: Path) -> DataConfig:
    return DataConfig(
        **_IDENTITY,
        gateway_addresses=list(gateways),
        datasets=[DatasetConfig(path=directory / "dataset", name=DATASET)],
    )


def worker_config(
    wanted: Scenario, number: int, gateways: Sequence[str], directory: Path, boasts: bool
) -> WorkerConfig:
    """Of the worker with that number, from 0; one that ``boasts`` offers more than any machine has."""
    return WorkerConfig(
        **_IDENTITY,
        gateway_addresses=list(gateways),
        work_dir=directory / "work",
        resources=ResourcesConfig(cpu=1e6 if boasts else 2, memory=1e6 if boasts else 4, storage=1),
        offer=OfferConfig(
            lease_s=wanted.lease_s,
            temporary_lease_s=5.0,
            price=wanted.prices[number % len(wanted.prices)],
            strategy="whole" if boasts else wanted.strategies[number % len(wanted.strategies)],
        ),
        executors=_executors(wanted, number),
        allow=AllowConfig(entrypoints=[ENTRYPOINT]),
        cache=CacheConfig(max_slices=6),
        storage=StorageConfig(checkpoints_gb=0.1 if wanted.replicas else 0.0),
        preemption=PreemptionConfig(notice_s=wanted.notice_s, file=directory / NOTICE, poll_s=_POLL_S)
        if gives_notice(wanted)
        else PreemptionConfig(),
        stop_grace_s=1.0,
        limits=WorkerLimitsConfig(enforce="none"),
    )


def _executors(wanted: Scenario, number: int) -> list[ExecutorConfig]:
    train = ExecutorConfig(kind="train", name=DEFAULT_EXECUTOR)
    aggregate = ExecutorConfig(kind="aggregate", name="parameter-server")
    if not wanted.apart or number > wanted.workers:
        return [train, aggregate]
    return [train] if number else [aggregate]


def scheduler_config(
    wanted: Scenario, number: int, gateways: Sequence[str], directory: Path
) -> SchedulerConfig:
    """Of the scheduler with that number; those from 1 on are rivals of the first."""
    bid, most = wanted.bids[number % len(wanted.bids)]
    price = PriceConfig(bid=bid, max=most)
    workers = max(1, wanted.workers - number)
    needs = {}
    if wanted.rivals:
        # a simulated worker runs one executor of each class
        needs = {
            "worker": NeedsConfig(cpu=1.5, memory=1.0),
            "parameter_server": NeedsConfig(cpu=0.5, memory=2.1),
        }
    job = JobConfig(
        name=JOB,
        model=ModelConfig(type="torch", entrypoint=ENTRYPOINT),
        inner_optimizer=InnerOptimizerConfig(learning_rate=0.05),
        # so that theta is wrong at once where steps are
        schedule=ScheduleConfig(type="linear-with-warmup", training_steps=10_000),
        dataset=DatasetRef(dataset=DATASET, wait_s=None),
        rounds=RoundsConfig(
            update_rounds=wanted.rounds,
            avg_samples_between_updates=wanted.samples_a_round,
            batch_size=wanted.batch_size,
            grace_s=3.0,
            deadline_s=wanted.deadline_s,
        ),
        resources=JobResourcesConfig(
            num_workers=workers,
            min_workers=wanted.min_workers,
            worker_price=price,
            parameter_server_price=price,
            **needs,
            hang_s=wanted.hang_s,
            load_s=wanted.model_s,
        ),
        checkpoint=CheckpointConfig(every_rounds=wanted.checkpoint_every, replicas=wanted.replicas),
        output=str(directory / "model"),
    )
    return SchedulerConfig(
        **_IDENTITY,
        gateway_addresses=list(gateways),
        state_dir=directory / "state",
        scheduler=SchedulerSection(job=job),
    )

"""From the job's configuration to what is searched for, and to the job descriptions that workers get."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from hypha import features
from hypha.config.job import (
    DEFAULT_BATCH_SIZE,
    JobConfig,
    JobResourcesConfig,
    ModelConfig,
    PreprocessorConfig,
    PriceConfig,
    outer_values,
)
from hypha.config.offers import ResourcesConfig
from hypha.errors import ConfigError, Problem
from hypha.messages import (
    AggregateJob,
    CheckpointPolicy,
    ExecutorClass,
    ExecutorDescriptor,
    HuggingFace,
    InnerOptimizer,
    LrSchedule,
    Manifest,
    ModelSpec,
    OuterOptimizer,
    PeerRef,
    Peers,
    PreprocessorSpec,
    Reference,
    Resources,
    TrainJob,
)
from hypha.rules.resources import batch_size
from hypha.runtime import new_id
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.leasing.events import Search
from hypha.scheduler.rounds.policy import Start

#: names under which the scheduler serves local directories
MODEL = "model"
PREPROCESSOR = "preprocessor"
#: columns that go to a model's labels where the job does not name one
_LABELS = ("labels", "label")
#: a job description is sent in one request of a megabyte
MAX_CLASS_NAMES_BYTES = 128 << 10

logger = logging.getLogger(__name__)


def resources_of(config: ResourcesConfig) -> Resources:
    """As on the wire."""
    return msgspec.convert(config, Resources, from_attributes=True)


def inputs_of(names: dict[str, str] | list[str]) -> dict[str, str]:
    """Argument -> column, however it was written."""
    return dict(names) if isinstance(names, dict) else {name: name for name in names}


def _source(config: ModelConfig | PreprocessorConfig, resource: str, scheduler: PeerRef) -> Reference | None:
    """None where an entrypoint makes it. Raises :class:`ConfigError` when it has no source, or several."""
    ways = ("path", "repository", "entrypoint") if isinstance(config, ModelConfig) else ("path", "repository")
    if sum(getattr(config, way) is not None for way in ways) != 1:
        problem = Problem(f"scheduler.job.{resource}", f"give exactly one of {', '.join(ways)}")
        raise ConfigError([problem])
    if config.path is not None:
        return Peers(peers=(scheduler,), resource=resource)
    if config.repository is None:
        return None
    return HuggingFace(
        repository=config.repository,
        revision=config.revision,
        filenames=tuple(config.filenames),
        token=config.token,
    )


def class_names(config: ModelConfig, manifest: Manifest) -> tuple[str, ...]:
    """What the classes of the column are called that goes to the model's labels; empty where nobody knows, or
    where they are too long to be sent around.
    """
    column = inputs_of(config.input_names).get("labels")
    columns = {one.name for one in manifest.columns}
    column = column or next((name for name in _LABELS if name in columns), None)
    names = next((one.names for one in manifest.labels if one.column == column), ())
    if sum(len(name.encode("utf-8", "replace")) + 4 for name in names) > MAX_CLASS_NAMES_BYTES:
        logger.warning("The names of %d classes are too long to be part of the trained model", len(names))
        return ()
    return names


def model_spec(config: ModelConfig, scheduler: PeerRef, names: tuple[str, ...] = ()) -> ModelSpec:
    """The model, whose classes are called ``names``; raises :class:`ConfigError` when it has no source."""
    return ModelSpec(
        task=config.type,
        source=_source(config, MODEL, scheduler),
        entrypoint=config.entrypoint,
        arguments=dict(config.arguments),
        inputs=inputs_of(config.input_names),
        loss=config.loss,
        seed=config.seed,
        trust_remote_code=config.trust_remote_code,
        class_names=names,
    )


def preprocessor_spec(config: PreprocessorConfig | None, scheduler: PeerRef) -> PreprocessorSpec | None:
    """The preprocessor, if there is one; :class:`ConfigError` when it has no source."""
    if config is None:
        return None
    source = _source(config, PREPROCESSOR, scheduler)
    assert source is not None, "only a model is made by an entrypoint"
    return PreprocessorSpec(kind=config.type, source=source, inputs=inputs_of(config.input_names))


def outer_optimizer(config: JobConfig, began: OuterOptimizer | None = None) -> OuterOptimizer:
    """Of a job that ``began`` with this one, if it did: what the configuration leaves open stays as it was,
    for a job has one outer optimizer, by which it is replayed. Of a new one: chosen by its number of rounds.
    """
    given = config.outer_optimizer
    rate, momentum = outer_values(given, config.rounds.update_rounds)
    if began is not None:
        rate = began.learning_rate if given.learning_rate is None else rate
        momentum = began.momentum if given.momentum is None else momentum
    return OuterOptimizer(learning_rate=rate, momentum=momentum)


def searches_for(
    resources: JobResourcesConfig,
    dataset: str | None = None,
    needs: Mapping[ExecutorClass, tuple[str, ...]] | None = None,
    most_batch: int | None = None,
) -> tuple[Search, Search]:
    """Whom a job looks for: training executors and a parameter server, under new request ids. ``needs`` are
    the features that each must have; ``most_batch`` is how often a worker can use what is asked of it.
    """
    needs = needs or {}

    def search(
        executor: ExecutorDescriptor,
        asked: ResourcesConfig,
        price: PriceConfig,
        least: int,
        useful: float | None,
        dataset: str | None = None,
    ) -> Search:
        return Search(
            request_id=new_id(),
            executor=executor,
            resources=resources_of(asked),
            bid=price.bid,
            max_price=price.max,
            dataset=dataset,
            needs=needs.get(executor.kind, ()),
            useful=useful,
            raise_after_s=price.raise_after_s,
            raise_by=price.raise_by,
            least=least,
        )

    trains = ExecutorDescriptor(kind="train", name=resources.worker_executor)
    aggregates = ExecutorDescriptor(kind="aggregate", name=resources.parameter_server_executor)
    least = resources.min_workers or resources.num_workers
    return (
        search(trains, resources.worker, resources.worker_price, least, most_batch, dataset),
        search(aggregates, resources.parameter_server, resources.parameter_server_price, 1, 1.0),
    )


def searches_of(job: JobConfig) -> tuple[Search, Search]:
    """Whom ``job`` looks for: as :func:`searches_for`, with the features that its descriptions need."""
    train, aggregate = described(job, PeerRef(peer=""), "")
    needed: dict[ExecutorClass, tuple[str, ...]] = {
        "train": features.needs(train),
        "aggregate": features.needs(aggregate),
    }
    most_batch = job.rounds.max_batch_size if job.rounds.batch_size is None else 1
    return searches_for(job.resources, job.dataset.dataset, needed, most_batch)


@dataclass(frozen=True)
class Descriptions:
    """Job descriptions of one generation of a job, but for what differs by worker."""

    config: JobConfig
    start: Start
    scheduler: PeerRef
    #: the ledger has its manifest, and its descriptions go without
    dataset: ServedDataset | None = None

    def batch_size(self, offered: Resources) -> int:
        """Of a worker that offered these resources."""
        rounds, needs = self.config.rounds, self.config.resources.worker
        if rounds.batch_size is not None:
            return rounds.batch_size
        by_offer = batch_size(offered, resources_of(needs), rounds.max_batch_size, DEFAULT_BATCH_SIZE)
        if needs.model_fields_set & {"gpu", "memory"}:
            return by_offer
        # the configuration does not tell what a sample needs: a larger offer is no reason for a smaller batch
        return max(by_offer, min(DEFAULT_BATCH_SIZE, rounds.max_batch_size))

    def train(self, me: str, parameter_server: PeerRef, batch: int, steps: int | None = None) -> TrainJob:
        """For the training executor of worker ``me``; ``steps`` were taken by the job before."""
        config, schedule = self.config, self.config.schedule
        return TrainJob(
            job_id=self.start.job_id,
            generation=self.start.generation,
            executor=ExecutorDescriptor(kind="train", name=config.resources.worker_executor),
            me=me,
            scheduler=self.scheduler,
            parameter_server=parameter_server,
            model=model_spec(config.model, self.scheduler),
            dataset=config.dataset.dataset,
            batch_size=batch,
            micro_batch_size=config.rounds.micro_batch_size,
            most_batch_size=config.rounds.max_batch_size if config.rounds.grow_batch_size else None,
            preprocessor=preprocessor_spec(config.preprocessor, self.scheduler),
            optimizer=msgspec.convert(config.inner_optimizer, InnerOptimizer, from_attributes=True),
            schedule=LrSchedule(
                kind=schedule.type,
                warmup_steps=schedule.warmup_steps,
                training_steps=schedule.training_steps,
                decay_steps=schedule.decay_steps,
            ),
            gradient_accumulation=config.rounds.gradient_accumulation,
            precision=config.precision,
            shuffle=config.dataset.shuffle,
            seed=config.seed,
            steps=self.start.steps if steps is None else steps,
            update_encoding=config.update_encoding,
            hang_s=config.resources.hang_s,
            manifest_hash=self.dataset.manifest_hash if self.dataset is not None else "",
        )

    def aggregate(self, me: str, restore: Reference | None) -> AggregateJob:
        """For the parameter server on worker ``me``; ``restore`` from a checkpoint of ``start.round``."""
        config, outer = self.config, self.config.outer_optimizer
        optimizer = outer_optimizer(config) if self.start.optimizer is None else self.start.optimizer
        manifest = None if self.dataset is None else self.dataset.manifest
        names = () if manifest is None else class_names(config.model, manifest)
        return AggregateJob(
            job_id=self.start.job_id,
            generation=self.start.generation,
            executor=ExecutorDescriptor(kind="aggregate", name=config.resources.parameter_server_executor),
            me=me,
            scheduler=self.scheduler,
            model=model_spec(config.model, self.scheduler, names),
            preprocessor=preprocessor_spec(config.preprocessor, self.scheduler),
            optimizer=optimizer,
            weighting=outer.weighting,
            max_update_norm=outer.max_update_norm,
            max_update_ratio=outer.max_update_ratio,
            checkpoint=msgspec.convert(config.checkpoint, CheckpointPolicy, from_attributes=True),
            round=self.start.round,
            restore=restore,
            slice_rows=() if manifest is None else tuple(part.samples for part in manifest.slices),
        )


def described(
    config: JobConfig, scheduler: PeerRef, job_id: str, began: OuterOptimizer | None = None
) -> tuple[TrainJob, AggregateJob]:
    """The job descriptions that executors get, for the ledger: without tokens, and without what differs by
    worker, generation and place. ``began`` is the outer optimizer that the job had so far.
    """
    model, preprocessor = config.model.model_copy(update={"token": None}), config.preprocessor
    if preprocessor is not None:
        preprocessor = preprocessor.model_copy(update={"token": None})
    resources = config.resources.model_copy(update={"hang_s": None})
    plain = config.model_copy(update={"model": model, "preprocessor": preprocessor, "resources": resources})
    start = Start(job_id, optimizer=outer_optimizer(config, began))
    descriptions = Descriptions(plain, start, PeerRef(peer=scheduler.peer))
    return descriptions.train("", PeerRef(peer=""), 0), descriptions.aggregate("", None)

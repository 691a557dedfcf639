"""Job descriptions from the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from hypha.config.job import DatasetRef, JobConfig
from hypha.errors import ConfigError
from hypha.messages import (
    ClassNames,
    Column,
    DatasetDescription,
    HuggingFace,
    Local,
    Manifest,
    OuterOptimizer,
    PeerRef,
    Peers,
    Resources,
)
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.descriptions import Descriptions, class_names, described, outer_optimizer
from hypha.scheduler.durable.starts import Generation
from hypha.scheduler.rounds.policy import Rules, Start
from hypha.scheduler.status.view import in_words

SCHEDULER = PeerRef(peer="s", addresses=("/ip4/10.0.0.1/tcp/4",))


def config(**changes: object) -> JobConfig:
    return JobConfig.model_validate(
        {
            "model": {"type": "image-classification", "path": "m", "input-names": ["pixel_values", "labels"]},
            "dataset": {"dataset": "digits"},
            "output": "out",
            **changes,
        }
    )


def descriptions(**changes: object) -> Descriptions:
    return Descriptions(config(**changes), Start("job", generation=2, round=5, steps=70), SCHEDULER)


def test_a_training_job() -> None:
    job = descriptions(
        preprocessor={"type": "image", "repository": "org/p", "input-names": {"images": "image"}},
        rounds={"batch_size": 16, "gradient_accumulation": 2},
        schedule={"type": "wsd", "warmup_steps": 3},
        seed=7,
    ).train("w", PeerRef(peer="p"), 16)
    assert (job.job_id, job.generation, job.me, job.steps) == ("job", 2, "w", 70)
    assert job.model.source == Peers(peers=(SCHEDULER,), resource="model")
    assert job.model.inputs == {"pixel_values": "pixel_values", "labels": "labels"}
    assert job.preprocessor is not None
    assert job.preprocessor.source == HuggingFace(repository="org/p")
    assert job.preprocessor.inputs == {"images": "image"}
    assert (job.schedule.kind, job.schedule.warmup_steps) == ("wsd", 3)
    assert (job.gradient_accumulation, job.batch_size, job.seed) == (2, 16, 7)
    assert job.parameter_server == PeerRef(peer="p")


def test_an_aggregate_job_starts_where_the_life_starts() -> None:
    generation = Generation(Start("job", round=5), SliceTracker([1]).to_state(), "scheduler")
    job = descriptions(
        outer_optimizer={"weighting": "uniform", "learning_rate": 0.5},
        checkpoint={"every-rounds": 3, "keep": 1, "place": "s3://b/c"},
    ).aggregate("p", generation.restore(SCHEDULER))
    assert job.restore == Peers(peers=(SCHEDULER,), resource="checkpoint/5")
    assert (job.round, job.weighting, job.optimizer.learning_rate) == (5, "uniform", 0.5)
    assert (job.checkpoint.every_rounds, job.checkpoint.keep, job.checkpoint.place) == (3, 1, "s3://b/c")


def test_where_a_checkpoint_is_restored_from() -> None:
    tracker = SliceTracker([1]).to_state()
    assert Generation(Start("j"), tracker).restore(SCHEDULER) is None
    assert Generation(Start("j", round=2), tracker, "/mnt/c/round-2").restore(SCHEDULER) == Local(
        url="/mnt/c/round-2"
    )


@pytest.mark.parametrize(("offered", "expected"), [(10.0, 5), (4.0, 2), (2.0, 16), (1000.0, 64)], ids=str)
def test_batch_size_is_offered_over_required(offered: float, expected: int) -> None:
    got = descriptions(resources={"worker": {"gpu": 2.0}})
    assert got.batch_size(Resources(gpu=offered)) == expected
    assert descriptions(rounds={"batch_size": 3}).batch_size(Resources(gpu=offered)) == 3


@pytest.mark.parametrize(("offered", "expected"), [(1.0, 16), (2.0, 16), (16.0, 16), (40.0, 40), (99.0, 64)])
def test_a_job_that_says_nothing_has_batches_of_sixteen_or_more(offered: float, expected: int) -> None:
    assert descriptions().batch_size(Resources(memory=offered)) == expected
    small = descriptions(rounds={"max_batch_size": 4})
    assert small.batch_size(Resources(memory=offered)) == 4


def test_the_outer_optimizer_is_chosen_by_the_number_of_rounds_unless_it_is_set() -> None:
    job = descriptions(rounds={"update_rounds": 8}).aggregate("p", None)
    assert job.optimizer == OuterOptimizer(learning_rate=1.0, momentum=0.6)
    job = descriptions(rounds={"update_rounds": 2}).aggregate("p", None)
    assert job.optimizer == OuterOptimizer(learning_rate=1.0, momentum=0.3)
    half = {"outer_optimizer": {"momentum": 0.3}}
    assert outer_optimizer(config(**half)) == OuterOptimizer(learning_rate=1.0, momentum=0.3)
    both = {"outer_optimizer": {"learning_rate": 0.7, "momentum": 0.9}, "rounds": {"update_rounds": 3}}
    assert outer_optimizer(config(**both)) == OuterOptimizer(learning_rate=0.7, momentum=0.9)


def test_a_job_that_goes_on_keeps_the_outer_optimizer_that_was_chosen() -> None:
    began = OuterOptimizer(learning_rate=1.0, momentum=0.5)
    longer = {"rounds": {"update_rounds": 500}}
    assert outer_optimizer(config(**longer), began) == began
    start = Start("job", generation=1, round=8, optimizer=began)
    assert Descriptions(config(**longer), start, SCHEDULER).aggregate("p", None).optimizer == began
    # what is set is set: a job with another optimizer is another job
    changed = config(**longer, outer_optimizer={"momentum": 0.8})
    assert outer_optimizer(changed, began) == OuterOptimizer(learning_rate=1.0, momentum=0.8)


@pytest.mark.parametrize(
    "model",
    [{"type": "causal-lm"}, {"type": "causal-lm", "path": Path("a"), "repository": "b"}],
    ids=["no source", "two sources"],
)
def test_a_model_has_one_source(model: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        descriptions(model=model).train("w", PeerRef(peer="p"), 1)


def test_rules() -> None:
    rules = Rules.from_config(
        config(rounds={"avg_samples_between_updates": 1200}, resources={"num_workers": 3})
    )
    assert (rules.samples, rules.inner_steps, rules.min_workers) == (1200, None, 3)
    rules = Rules.from_config(
        config(rounds={"inner_steps": 50}, resources={"num_workers": 3, "min_workers": 9})
    )
    assert (rules.inner_steps, rules.min_workers) == (50, 3)
    assert Rules.from_config(config()).samples > 0


def test_resources_in_words() -> None:
    assert in_words(Resources(cpu=2, gpu=10)) == "cpu=2 gpu=10"
    assert in_words(Resources()) == "anything"


def test_the_datasets_names_of_classes_go_to_whoever_exports() -> None:
    manifest = Manifest(
        name="flowers",
        columns=(Column(name="labels", dtype="I64", shape=()), Column(name="kind", dtype="I64", shape=())),
        slices=(),
        labels=(
            ClassNames(column="kind", names=("rose", "tulip")),
            ClassNames(column="labels", names=("a", "b", "c")),
        ),
    )
    assert class_names(config().model, manifest) == ("a", "b", "c")
    named = {"type": "image-classification", "path": "m", "input-names": {"labels": "kind"}}
    model = config(model=named).model
    assert class_names(model, manifest) == ("rose", "tulip")
    assert class_names(model, replace(manifest, labels=())) == ()
    # a description is sent in one request
    many = (ClassNames(column="kind", names=tuple(f"{number:050}" for number in range(5000))),)
    assert class_names(model, replace(manifest, labels=many)) == ()
    description = DatasetDescription(manifest=manifest, manifest_hash="h")
    served = ServedDataset(DatasetRef(dataset="d"), description, [])
    job = Descriptions(config(), Start("job"), SCHEDULER, served)
    assert job.aggregate("p", None).model.class_names == ("a", "b", "c")
    # neither what is compared when the job is taken up again, nor what trainers are told, has them
    assert job.train("w", PeerRef(peer="p"), 16).model.class_names == ()
    assert described(config(), SCHEDULER, "job")[1].model.class_names == ()

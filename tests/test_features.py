"""What a job needs of a worker, and what a worker of another version has."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from tests.recorded.examples import words as all_words
from tests.recorded.record import VERSIONS

from hypha import __version__
from hypha.features import (
    BASELINE,
    FEATURES,
    NAMES,
    OURS,
    Abilities,
    advice,
    features_of,
    in_words,
    kind_of,
    missing_services,
    needs,
    printable,
    words,
)
from hypha.messages import (
    MAX_FEATURES,
    MAX_VERSION_LENGTH,
    AggregateJob,
    CheckpointPolicy,
    ExecutorDescriptor,
    HuggingFace,
    InnerOptimizer,
    LrSchedule,
    ModelSpec,
    OuterOptimizer,
    PeerRef,
    Peers,
    PreprocessorSpec,
    Resources,
    TrainJob,
    WorkerOffer,
)

#: Fields, values and tasks of job descriptions that came after the baseline and that executors which do not
#: know them may ignore, in the form of :func:`hypha.features.words`.
#: Without max_update_ratio huge updates count as they are, as they did before there was one. Without
#: class_names the export calls its classes as config.json does. Without slice_rows an update of rows that do
#: not exist is added, and only the scheduler does not believe it. Without manifest_hash a worker takes the
#: scheduler's word for what the slices are. Without micro_batch_size a batch goes through the model at once,
#: and without most_batch_size it stays as large as it is.
MAY_BE_IGNORED: frozenset[str] = frozenset(
    {
        "aggregate.max_update_ratio",
        "aggregate.slice_rows",
        "aggregate.model.class_names",
        "train.manifest_hash",
        "train.micro_batch_size",
        "train.most_batch_size",
        "train.model.class_names",
    }
)

SCHEDULER = PeerRef(peer="S")
TORCH = ModelSpec(task="torch", entrypoint="models:make")


def train(**more: Any) -> TrainJob:
    fields: dict[str, Any] = {
        "job_id": "job",
        "generation": 0,
        "executor": ExecutorDescriptor(kind="train", name="diloco-transformer"),
        "me": "W",
        "scheduler": SCHEDULER,
        "parameter_server": PeerRef(peer="P"),
        "model": TORCH,
        "dataset": "tiny",
        "batch_size": 1,
    }
    return TrainJob(**{**fields, **more})


def aggregate(**more: Any) -> AggregateJob:
    fields: dict[str, Any] = {
        "job_id": "job",
        "generation": 0,
        "executor": ExecutorDescriptor(kind="aggregate", name="parameter-server"),
        "me": "P",
        "scheduler": SCHEDULER,
        "model": TORCH,
    }
    return AggregateJob(**{**fields, **more})


@pytest.mark.parametrize(
    ("job", "needed"),
    [
        (train(), ["torch-models"]),
        (train(model=ModelSpec(task="ctc", source=Peers(peers=(SCHEDULER,)))), ["served-files"]),
        (
            train(model=ModelSpec(task="ctc", source=HuggingFace(repository="a/b"), trust_remote_code=True)),
            ["hub-files", "remote-code"],
        ),
        (train(precision="bf16", update_encoding="int8"), ["torch-models", "bf16", "int8-updates"]),
        (train(precision="fp16", update_encoding="bf16"), ["torch-models", "fp16", "bf16-updates"]),
        (
            train(model=ModelSpec(task="torch", entrypoint="m:f", loss="bce-with-logits")),
            ["torch-models", "named-losses", "multi-label"],
        ),
        (
            train(model=ModelSpec(task="ctc", arguments={"problem_type": "multi_label_classification"})),
            ["multi-label"],
        ),
        (train(model=ModelSpec(task="ctc", arguments={"problem_type": "regression"})), []),
        (
            train(
                schedule=LrSchedule(kind="wsd"),
                optimizer=InnerOptimizer(max_grad_norm=1.0),
                gradient_accumulation=4,
            ),
            ["torch-models", "learning-rate-schedules", "gradient-clipping", "gradient-accumulation"],
        ),
        (
            train(
                model=ModelSpec(task="causal-lm"),
                preprocessor=PreprocessorSpec(kind="tokenizer", source=Peers(peers=(SCHEDULER,))),
            ),
            ["served-files", "preprocessors"],
        ),
        (aggregate(), ["torch-models"]),
        (
            aggregate(
                optimizer=OuterOptimizer(learning_rate=1.0),
                weighting="uniform",
                max_update_norm=1.0,
                checkpoint=CheckpointPolicy(place="s3://bucket"),
            ),
            ["torch-models", "uniform-weighting", "update-norm-limit", "checkpoint-places"],
        ),
    ],
)
def test_what_a_job_needs_follows_from_its_description(
    job: TrainJob | AggregateJob, needed: list[str]
) -> None:
    assert list(needs(job)) == needed
    assert OURS.lacks(needed) == ()


def test_each_feature_can_be_needed() -> None:
    """A word that no description has, misspelt or removed, would never ask for its feature."""
    known = set(all_words())
    for feature in FEATURES:
        for word in feature.words:
            # what keys of a table a model takes is its own affair
            assert word in known or ".arguments." in word, f"{feature.name}: no job says {word}"
    assert len(set(NAMES)) == len(NAMES) <= MAX_FEATURES
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in NAMES)
    assert max(map(len, NAMES)) <= MAX_VERSION_LENGTH


def test_it_is_decided_of_every_word_of_a_job_whether_an_older_executor_may_ignore_it() -> None:
    """Executors ignore fields that they do not know, and fail at values: neither may happen unforeseen."""
    baseline = set(json.loads((VERSIONS / "before-0.1.0" / "words.json").read_text(encoding="utf-8")))
    decided = MAY_BE_IGNORED.union(*(feature.words for feature in FEATURES if not feature.baseline))
    new = sorted(set(all_words()) - baseline - decided)
    assert not new, (
        f"jobs can ask for what peers that state no version do not know: {', '.join(new)}; for each, add a "
        "feature with baseline=False to hypha.features, or the word to MAY_BE_IGNORED here"
    )


def test_words_are_what_is_not_as_by_default() -> None:
    said = words(train(precision="bf16"))
    assert {"train.precision", "train.precision=bf16", "train.model.entrypoint=models:make"} <= said
    assert not {"train.schedule", "train.optimizer", "train.shuffle", "train.hang_s"} & said


def test_a_peer_that_states_no_version_has_the_baseline() -> None:
    assert Abilities().lacks(["fp16", "multi-label"]) == ("multi-label",)
    assert Abilities(features=("multi-label",)).lacks(["fp16", "multi-label"]) == ("multi-label",)
    # a version that gave a feature up
    assert Abilities("9.0", ("multi-label",)).lacks(["fp16", "multi-label"]) == ("fp16",)
    assert Abilities(__version__, NAMES).lacks(NAMES) == ()
    assert set(NAMES) > BASELINE


def test_advice_names_what_to_leave_out() -> None:
    assert advice(["fp16", "int8-updates"]) == (
        f'upgrade it to Hypha {__version__} or later, or leave precision = "fp16" and '
        'update_encoding = "int8" out of the job'
    )
    assert advice(["of-a-later-version"]) == f"upgrade it to Hypha {__version__} or later"
    assert in_words(["fp16", "odd\x1b[31m"]) == (
        "fp16 (a version with it trains in mixed precision with fp16), odd\N{REPLACEMENT CHARACTER}[31m"
    )


def test_what_a_peer_states_is_bounded() -> None:
    offer = WorkerOffer(
        lease_id="l",
        request_id="r",
        worker=PeerRef(peer="W"),
        resources=Resources(cpu=1),
        price=1.0,
        expires_in_s=1.0,
    )
    sent = msgspec.to_builtins(offer)
    fits = sent | {"version": "v" * MAX_VERSION_LENGTH, "features": ["f" * MAX_VERSION_LENGTH] * MAX_FEATURES}
    assert msgspec.convert(fits, WorkerOffer).version == "v" * MAX_VERSION_LENGTH
    for more in (
        {"version": "v" * (MAX_VERSION_LENGTH + 1)},
        {"features": ["f"] * (MAX_FEATURES + 1)},
        {"features": ["f" * (MAX_VERSION_LENGTH + 1)]},
        {"version": 1},
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(sent | more, WorkerOffer)
    assert printable("0.1\x1b[2J" + "x" * 100) == "0.1\N{REPLACEMENT CHARACTER}[2J" + "x" * 54 + "..."


def test_each_component_states_its_own_features() -> None:
    assert features_of("hypha-worker") == NAMES
    gateway, data = features_of("hypha-gateway"), features_of("hypha-data")
    assert gateway
    assert data
    assert not {*gateway} & {*data}
    assert not {*gateway, *data} & {*NAMES}
    assert features_of("hypha-scheduler") == features_of("hypha-probe") == ()
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in (*gateway, *data))
    # what an earlier gateway lacks is all that; of a later one nothing is missed, whatever else it has
    assert missing_services("gateway", Abilities("0.0.9")) == gateway
    assert missing_services("gateway", Abilities("9.0", (*gateway, "more"))) == ()
    assert missing_services(kind_of("hypha-worker"), Abilities()) == ()
    assert in_words(data).startswith(f"{data[0]} (a version with it says ")

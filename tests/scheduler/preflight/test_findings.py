"""What is found by comparing a job with its dataset: one line with what disagrees, and what to change."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from hypha.config.job import JobConfig
from hypha.messages import Column, ColumnRange, Manifest, SliceInfo
from hypha.scheduler.preflight.findings import findings
from hypha.scheduler.preflight.known import ModelDescription, PreflightFinding, describe_model

RESNET = {"model_type": "resnet", "num_channels": 1, "id2label": {str(n): str(n) for n in range(10)}}
VIT = {**RESNET, "model_type": "vit", "image_size": 8}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16}
BERT = {"model_type": "bert", "vocab_size": 64, "max_position_embeddings": 32, "num_labels": 3}
DIGITS = ("labels I64", "pixel_values F32 1 8 8")
TOKENS = ("input_ids I32 16",)
SENTENCES = ("text U8 64", "labels I64")


def manifest(*columns: str, slices: int = 4, **ranges: tuple[float, ...]) -> Manifest:
    """``columns`` as ``name dtype axes``; ``ranges`` as (low, high) or (low, high, ignored). The numbers of a
    column of floats are whole where both ends are.
    """
    made = []
    for text in columns:
        name, dtype, *shape = text.split()
        made.append(Column(name=name, dtype=dtype, shape=tuple(int(axis) for axis in shape)))
    seen = [
        ColumnRange(
            column=name,
            low=low,
            high=high,
            whole=low == int(low) and high == int(high),
            ignored=int(sum(rest)),
        )
        for name, (low, high, *rest) in ranges.items()
    ]
    parts = tuple(SliceInfo(file=f"{n}", samples=20, size=9, blake3="00") for n in range(slices))
    return Manifest(name="d", columns=tuple(made), slices=parts, ranges=tuple(seen))


def found(
    described: dict[str, object] | None,
    data: Manifest,
    task: str = "image-classification",
    preprocessor: dict[str, Any] | None = None,
    preprocessor_file: dict[str, object] | None = None,
    **model: Any,
) -> list[PreflightFinding]:
    source = {"entrypoint": "package:Model"} if task == "torch" else {"path": "model"}
    keys: dict[str, Any] = {
        "model": {"type": task, **source, **model},
        "dataset": {"dataset": "d"},
        "resources": {"num_workers": 2},
        "output": "out",
    }
    if preprocessor is not None:
        keys["preprocessor"] = {"path": "preprocessor", **preprocessor}
    observed = None if described is None else describe_model(described, model.get("arguments", {}))
    return findings(JobConfig.model_validate(keys), data, observed, preprocessor_file)


TOKENIZER = {"type": "tokenizer", "input_names": {"text": "text"}}

#: (config.json, dataset, the job's model): nothing is wrong
FINE: dict[str, tuple[dict[str, object] | None, Manifest, dict[str, Any]]] = {
    "labels": (RESNET, manifest(*DIGITS, labels=(0, 9), pixel_values=(0, 1)), {}),
    "a manifest of an earlier version": (RESNET, manifest(*DIGITS), {}),
    "labels that no loss counts": (RESNET, manifest(*DIGITS, labels=(0, 9, 5)), {}),
    "a column called label": (RESNET, manifest("label U8", DIGITS[1], label=(0, 9)), {}),
    "labels as whole floats": (RESNET, manifest("labels F32", DIGITS[1], labels=(0, 9)), {}),
    "half precision": (RESNET, manifest("labels I64", "pixel_values F16 1 8 8", labels=(0, 9)), {}),
    "columns by other names": (
        RESNET,
        manifest("image F32 1 8 8", "digit I64", digit=(0, 9)),
        {"input_names": {"pixel_values": "image", "labels": "digit"}},
    ),
    "another number of labels": (
        RESNET,
        manifest(*DIGITS, labels=(0, 19)),
        {"arguments": {"num_labels": 20}},
    ),
    "several labels a row": (
        {**RESNET, "problem_type": "multi_label_classification"},
        manifest("labels I64 10", DIGITS[1], labels=(0, 1)),
        {},
    ),
    "regression": (
        RESNET,
        manifest("labels F32", DIGITS[1], labels=(-3.5, 12.25)),
        {"arguments": {"num_labels": 1}},
    ),
    "a loss of its own": (RESNET, manifest("labels F32", DIGITS[1], labels=(-3.5, 12)), {"loss": "mse"}),
    "a vision transformer": (VIT, manifest(*DIGITS, labels=(0, 9)), {}),
    "tokens": (GPT2, manifest(*TOKENS, input_ids=(0, 63)), {"task": "causal-lm"}),
    "labels of tokens": (
        GPT2,
        manifest(*TOKENS, "labels I64 16", input_ids=(0, 63), labels=(0, 63, 7)),
        {"task": "causal-lm"},
    ),
    "texts": (
        {**BERT, "id2label": {"0": "no", "1": "yes", "2": "maybe"}},
        manifest(*SENTENCES, labels=(0, 2)),
        {"task": "sequence-classification", "preprocessor": TOKENIZER},
    ),
    "classes of pixels, one of which is left out": (
        {"model_type": "segformer", "num_labels": 3},
        manifest("pixel_values F32 3 32 32", "labels U8 32 32", labels=(0, 255)),
        {"task": "semantic-segmentation"},
    ),
    "plain PyTorch": (None, manifest("a F32 4", "b I64", b=(0, 99)), {"task": "torch"}),
    "a vocabulary that config.json does not name": (
        {"model_type": "gpt2"},
        manifest(*TOKENS, input_ids=(0, 50256)),
        {"task": "causal-lm"},
    ),
}

#: the same, with the key and the words of the one error
WRONG: dict[str, tuple[dict[str, object] | None, Manifest, dict[str, Any], str, list[str]]] = {
    "more labels than classes": (
        RESNET,
        manifest(*DIGITS, labels=(0, 11)),
        {},
        "scheduler.job.model.arguments",
        ["labels runs from 0 to 11", "10 classes, 0 to 9", "num_labels", "12 at least"],
    ),
    "two classes where config.json names none": (
        {"model_type": "resnet", "num_channels": 1},
        manifest(*DIGITS, labels=(0, 9)),
        {},
        "scheduler.job.model.arguments",
        ["the model has 2 classes", "10 at least"],
    ),
    "labels that count from 1": (
        RESNET,
        manifest(*DIGITS, labels=(1, 10)),
        {},
        "scheduler.job.dataset.dataset",
        ["from 1 to 10", "number the classes from 0"],
    ),
    "labels below 0": (
        RESNET,
        manifest(*DIGITS, labels=(-1, 9)),
        {},
        "scheduler.job.dataset.dataset",
        ["from -1 to 9", "-100 is left out"],
    ),
    "labels that are no classes": (
        RESNET,
        manifest("labels F32", DIGITS[1], labels=(0, 0.5)),
        {},
        "scheduler.job.model.loss",
        ["labels (F32, 0 to 0.5)", "10 classes", "num_labels = 1"],
    ),
    "fractions for cross-entropy": (
        None,
        manifest("x F32 4", "labels F32", labels=(0, 0.5)),
        {"task": "torch", "loss": "cross-entropy"},
        "scheduler.job.model.loss",
        ["does not hold whole numbers", "mse"],
    ),
    "classes for a loss of probabilities": (
        None,
        manifest("x F32 4", "labels I64", labels=(0, 9)),
        {"task": "torch", "loss": "bce-with-logits"},
        "scheduler.job.model.loss",
        ["0 to 9", "bce-with-logits takes 0 to 1", "cross-entropy"],
    ),
    "one label where several are wanted": (
        {**RESNET, "problem_type": "multi_label_classification"},
        manifest(*DIGITS, labels=(0, 1)),
        {},
        "scheduler.job.model.arguments",
        ["labels has one number a row", "wants 10"],
    ),
    "another number of labels a row": (
        RESNET,
        manifest("labels I64 4", DIGITS[1], labels=(0, 1)),
        {},
        "scheduler.job.model.arguments",
        ["4 columns", "wants 10"],
    ),
    "several labels a row that are no yes or no": (
        {**RESNET, "problem_type": "multi_label_classification"},
        manifest("labels I64 10", DIGITS[1], labels=(0, 3)),
        {},
        "scheduler.job.model.loss",
        ["0 to 3", "takes 0 to 1"],
    ),
    "no labels": (
        RESNET,
        manifest("pixel_values F32 1 8 8", "kind I64"),
        {},
        "scheduler.job.dataset.dataset",
        ["no column labels", "kind I64, pixel_values F32 [1, 8, 8]", "--rename"],
    ),
    "input names without labels": (
        RESNET,
        manifest(*DIGITS),
        {"input_names": ["pixel_values"]},
        "scheduler.job.model.input_names",
        ["names pixel_values, but no labels"],
    ),
    "an input name that is no column": (
        RESNET,
        manifest(*DIGITS),
        {"input_names": {"pixel_values": "image", "labels": "labels"}},
        "scheduler.job.model.input_names",
        ["the column image", "labels I64, pixel_values F32 [1, 8, 8]"],
    ),
    "a label that is no column": (
        RESNET,
        manifest(*DIGITS),
        {"input_names": {"pixel_values": "pixel_values", "labels": "digit"}},
        "scheduler.job.model.input_names",
        ["labels is to be the column digit"],
    ),
    "images by another name": (
        RESNET,
        manifest("image F32 1 8 8", "label I64", label=(0, 9)),
        {},
        "scheduler.job.model.input_names",
        ["takes pixel_values", "image F32 [1, 8, 8]", "--rename COLUMN=pixel_values"],
    ),
    "a language model as an image classifier": (
        {**GPT2, "architectures": ["GPT2LMHeadModel"]},
        manifest("input_ids I32 16", "labels I32 16", input_ids=(0, 63), labels=(0, 63)),
        {},
        "scheduler.job.model.type",
        ["it is image-classification", "names a model for causal-lm", "set it to causal-lm"],
    ),
    "images as bytes": (
        RESNET,
        manifest("image U8 900", "label I64", label=(0, 9)),
        {},
        "scheduler.job.dataset.dataset",
        ["image seems to be files of images as bytes", "decode"],
    ),
    "text without a tokenizer": (
        GPT2,
        manifest("text U8 64"),
        {"task": "causal-lm"},
        "scheduler.job.preprocessor",
        ["takes input_ids", "text U8 [64]", "tokenizer"],
    ),
    "a tokenizer for tokens": (
        GPT2,
        manifest(*TOKENS, input_ids=(0, 63)),
        {
            "task": "causal-lm",
            "preprocessor": {"type": "tokenizer", "input_names": {"text": "input_ids"}},
        },
        "scheduler.job.preprocessor",
        ["input_ids I32 [16]", "leave the preprocessor out"],
    ),
    "a preprocessor's column that is not there": (
        GPT2,
        manifest("text U8 64"),
        {
            "task": "causal-lm",
            "preprocessor": {"type": "tokenizer", "input_names": {"text": "sentence"}},
        },
        "scheduler.job.preprocessor.input_names",
        ["the column sentence", "text U8 [64]"],
    ),
    "a preprocessor without columns": (
        GPT2,
        manifest("text U8 64"),
        {"task": "causal-lm", "preprocessor": {"type": "tokenizer"}},
        "scheduler.job.preprocessor.input_names",
        ["names no columns", "text U8 [64]"],
    ),
    "tokens of another vocabulary": (
        GPT2,
        manifest(*TOKENS, input_ids=(0, 255)),
        {"task": "causal-lm"},
        "scheduler.job.dataset.dataset",
        ["from 0 to 255", "vocabulary has 64", "vocab_size = 256"],
    ),
    "tokens with what only labels may have": (
        GPT2,
        manifest(*TOKENS, input_ids=(0, 63, 4)),
        {"task": "causal-lm"},
        "scheduler.job.dataset.dataset",
        ["from -100 to 63"],
    ),
    "tokens as floats": (
        GPT2,
        manifest("input_ids F32 16", input_ids=(0, 63)),
        {"task": "causal-lm"},
        "scheduler.job.dataset.dataset",
        ["input_ids is F32", "--dtype input_ids=I64"],
    ),
    "longer than a table of positions": (
        GPT2,
        manifest("input_ids I32 32", input_ids=(0, 63)),
        {"task": "causal-lm"},
        "scheduler.job.dataset.dataset",
        ["32 tokens", "16 positions", "--sequence-length 16"],
    ),
    "channels": (
        RESNET,
        manifest("labels I64", "pixel_values F32 3 8 8", labels=(0, 9)),
        {},
        "scheduler.job.dataset.dataset",
        ["have 3 channels", "takes 1", "--image-channels 1", "num_channels = 3"],
    ),
    "channels last": (
        RESNET,
        manifest("labels I64", "pixel_values F32 8 8 1", labels=(0, 9)),
        {},
        "scheduler.job.dataset.dataset",
        ["channels last"],
    ),
    "flat images": (
        RESNET,
        manifest("labels I64", "pixel_values F32 64", labels=(0, 9)),
        {},
        "scheduler.job.dataset.dataset",
        ["pixel_values F32 [64]", "--shape"],
    ),
    "the size of images": (
        VIT,
        manifest("labels I64", "pixel_values F32 1 16 16", labels=(0, 9)),
        {},
        "scheduler.job.dataset.dataset",
        ["16x16", "8x8", "--image-size 8x8"],
    ),
}


@pytest.mark.parametrize("name", FINE)
def test_what_goes_together_is_not_remarked_on(name: str) -> None:
    described, data, model = FINE[name]
    assert found(described, data, **model) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_train_is_one_line_with_what_to_change(name: str) -> None:
    described, data, model, key, words = WRONG[name]
    (one,) = found(described, data, **model)
    assert one.error
    assert one.key == key
    assert [word for word in words if word not in one.message] == [], one.message
    assert "\n" not in one.message


def test_what_may_be_meant_is_advice() -> None:
    unexpected = found(RESNET, manifest(*DIGITS, labels=(0, 4)))
    few = found(RESNET, manifest(*DIGITS, slices=1, labels=(0, 9)))
    llama = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 16}
    longer = found(llama, manifest("input_ids I32 32", input_ids=(0, 63)), task="causal-lm")
    other_size = {**RESNET, "model_type": "swin", "image_size": 224}
    images = found(other_size, manifest(*DIGITS, labels=(0, 9)))
    for (one,), word in ((unexpected, "num_labels"), (few, "1 slices for 2 workers"), (longer, "32 tokens")):
        assert not one.error
        assert word in one.message
    assert longer[0].refutable
    assert images[0].refutable
    assert not unexpected[0].refutable


def test_pixels_that_would_be_scaled_twice_are_remarked_on() -> None:
    data = manifest(*DIGITS, labels=(0, 9), pixel_values=(0, 1))
    images = {"type": "image", "input_names": {"images": "pixel_values"}}
    (one,) = found(RESNET, data, preprocessor=images, preprocessor_file={"do_rescale": True})
    assert not one.error
    assert "run from 0 to 1 already" in one.message
    assert found(RESNET, data, preprocessor=images, preprocessor_file={"do_rescale": False}) == []
    assert found(RESNET, data, preprocessor=images) == []


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 1e300])
def test_numbers_that_a_peer_makes_up_are_only_shown(odd: float) -> None:
    ranges = tuple(
        ColumnRange(column=name, low=-odd, high=odd) for name in ("labels", "pixel_values", "input_ids")
    )
    data = msgspec.structs.replace(manifest(*DIGITS, *TOKENS), ranges=ranges)
    for task in ("image-classification", "causal-lm", "token-classification"):
        assert all("\n" not in str(one) for one in found({**GPT2, **RESNET}, data, task))
    bare = msgspec.structs.replace(data, columns=(Column(name="labels", dtype="?", shape=(-1, 0)),))
    found(RESNET, bare)


def test_errors_come_first() -> None:
    several = found(RESNET, manifest("labels I64", "pixel_values F32 3 8 8", slices=1, labels=(0, 11)))
    assert [one.error for one in several] == [True, True, False]


def test_a_configuration_says_less_than_a_model_knows() -> None:
    assert describe_model({}, {}) == ModelDescription(num_labels=2)
    nested = describe_model({"model_type": "x", "text_config": {"vocab_size": 9}, "image_size": [4, 6]}, {})
    assert (nested.vocab_size, nested.image_size) == (9, (4, 6))
    changed = describe_model(GPT2, {"vocab_size": 100, "n_positions": 8, "num_labels": 5})
    assert (changed.vocab_size, changed.positions, changed.num_labels) == (100, 8, 5)
    assert describe_model({"image_size": "large", "num_channels": True}, {}) == ModelDescription(num_labels=2)

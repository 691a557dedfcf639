"""A batch that is tried on a model before anybody is leased: what any worker would say, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.executor.test_models import GPT2, RESNET, directory
from tests.executor.test_preprocessing import tokenizer
from tests.executor.test_weights import CAUSAL, changed, pretrained, two_matrices

from hypha.executor import trial as trying
from hypha.executor.trial import try_batch
from hypha.messages import (
    Column,
    ColumnRange,
    ExecutorDescriptor,
    Local,
    ModelSpec,
    PeerRef,
    PreprocessorSpec,
    TrainJob,
    Trial,
    TrialReport,
)

Columns = dict[str, tuple[str, tuple[int, ...], tuple[float, float] | None]]

IMAGES = ModelSpec(task="image-classification")
DIGITS: Columns = {"labels": ("I64", (), (0, 9)), "pixel_values": ("F32", (1, 8, 8), (0, 1))}
TOKENS: Columns = {"input_ids": ("I32", (16,), (0, 127))}
ROWS: Columns = {"x": ("F32", (8,), None), "labels": ("I64", (), (0, 2))}
VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "intermediate_size": 8, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10
}  # fmt: skip


def odd(name: str, **arguments: str) -> ModelSpec:
    return ModelSpec(task="torch", entrypoint=f"tests.executor.odd_models:{name}", arguments=dict(arguments))


def tried(
    spec: ModelSpec, columns: Columns, source: Path | None = None, words: Path | None = None, rows: int = 2
) -> TrialReport:
    preprocessor = None
    if words is not None:
        preprocessor = PreprocessorSpec(
            kind="tokenizer", source=Local(url=str(words)), inputs={"text": "text"}
        )
    job = TrainJob(
        job_id="",
        generation=0,
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        me="",
        scheduler=PeerRef(peer=""),
        parameter_server=PeerRef(peer=""),
        model=spec,
        dataset="d",
        batch_size=0,
        preprocessor=preprocessor,
    )
    ranges = (
        ColumnRange(column=name, low=seen[0], high=seen[1])
        for name, (_, _, seen) in columns.items()
        if seen is not None
    )
    return try_batch(
        Trial(
            job=job,
            model=None if source is None else str(source),
            preprocessor=None if words is None else str(words),
            weights=True,
            columns=tuple(
                Column(name=name, dtype=dtype, shape=shape) for name, (dtype, shape, _) in columns.items()
            ),
            ranges=tuple(ranges),
            rows=rows,
        )
    )


def test_what_goes_together_passes(tmp_path: Path) -> None:
    resnet = directory(tmp_path / "resnet", RESNET)
    half: Columns = {**DIGITS, "pixel_values": ("F16", (1, 8, 8), (0, 1))}
    several: Columns = {**DIGITS, "labels": ("I64", (10,), (0, 1))}
    many = ModelSpec(task="image-classification", arguments={"problem_type": "multi_label_classification"})
    texts: Columns = {"text": ("U8", (64,), (0, 122))}
    reports = [
        tried(IMAGES, DIGITS, resnet),
        tried(IMAGES, half, resnet),
        tried(many, several, resnet),
        tried(CAUSAL, TOKENS, directory(tmp_path / "gpt2", GPT2)),
        tried(CAUSAL, texts, directory(tmp_path / "gpt2", GPT2), tokenizer(tmp_path / "words")),
        *(tried(odd(name), ROWS) for name in ("RunningMean", "ColumnMajor")),
    ]
    assert [(one.outcome, one.reason, one.shapes_only) for one in reports] == [("passed", "", False)] * 7
    assert all(one.parameters > 0 for one in reports)
    assert reports[0].notes == (
        "the model's source holds no weights: it is trained from scratch, from the seed 0",
    )


def test_weights_are_loaded_as_the_parameter_server_loads_them(tmp_path: Path) -> None:
    whole = tried(CAUSAL, TOKENS, pretrained(tmp_path / "whole"))
    assert (whole.outcome, whole.notes) == ("passed", ())
    wrapped = changed(
        pretrained(tmp_path / "wrapped"), lambda weights: {f"module.{k}": v for k, v in weights.items()}
    )
    report = tried(CAUSAL, TOKENS, wrapped)
    assert report.outcome == "failed"
    assert "its keys begin with 'module.'" in report.reason
    other = directory(tmp_path / "other", GPT2)
    (other / "consolidated.00.pth").write_bytes(b"weights")
    report = tried(CAUSAL, TOKENS, other)
    assert report.outcome == "failed"
    assert "consolidated.00.pth" in report.reason
    ids: Columns = {"input_ids": ("I32", (8,), (0, 31))}
    report = tried(CAUSAL, ids, two_matrices(tmp_path / "tied", GPT2))
    assert report.outcome == "passed"
    assert any("both are trained" in note for note in report.notes)


FAILS: dict[str, tuple[dict[str, Any] | None, ModelSpec, Columns, list[str]]] = {
    "labels": (
        None,
        odd("Classifier"),
        {**ROWS, "labels": ("I64", (), (0, 4))},
        ["labels run from 0 to 4", "fewer outputs"],
    ),
    "a column's size": (None, odd("Classifier"), {**ROWS, "x": ("F32", (9,), None)}, ["x float32[2, 9]"]),
    "a name that the forward does not have": (
        None,
        ModelSpec(
            task="torch",
            entrypoint="tests.executor.odd_models:Classifier",
            inputs={"y": "x", "labels": "labels"},
        ),
        ROWS,
        ["gives the column x as y", "takes x, labels"],
    ),
    "an argument that no column is": (
        None,
        odd("Classifier"),
        {"labels": ROWS["labels"], "a": ROWS["x"], "b": ROWS["x"]},
        ["none of the columns a, b, labels is an argument of the model (x, labels)"],
    ),
    "a name of the package that is not there": (None, odd("Nowhere"), ROWS, ["no attribute 'Nowhere'"]),
    "a module that is not there": (
        None,
        ModelSpec(task="torch", entrypoint="tests.executor.nowhere:Model"),
        ROWS,
        ["No module named 'tests.executor.nowhere'"],
    ),
    "an argument of the entrypoint": (None, odd("Classifier", size="9"), ROWS, ["unexpected keyword"]),
    "a tensor that cannot travel": (None, odd("Unfit", kind="half"), ROWS, ["parameter scale"]),
    "a parameter without a size": (None, odd("Unfit", kind="lazy"), ROWS, ["late.weight has no values"]),
    "a default that config.json does not name": (
        {key: value for key, value in RESNET.items() if key != "num_channels"},
        IMAGES,
        DIGITS,
        ["the images have 1 channel(s), but the model takes 3"],
    ),
    "a task that the model is not made for": (
        GPT2,
        IMAGES,
        DIGITS,
        ["AutoModelForImageClassification cannot load the model", "GPT2Config"],
    ),
    "an argument that config.json does not have": (
        RESNET,
        ModelSpec(task="image-classification", arguments={"vocab_sise": 3}),
        DIGITS,
        ["no 'vocab_sise'"],
    ),
}


@pytest.mark.parametrize("name", FAILS)
def test_what_every_worker_would_say_is_a_failure_with_its_line(name: str, tmp_path: Path) -> None:
    config, spec, columns, words = FAILS[name]
    report = tried(spec, columns, None if config is None else directory(tmp_path, config))
    assert report.outcome == "failed", report
    assert [word for word in words if word not in report.reason] == [], report.reason
    assert "\n" not in report.reason


def test_a_batch_of_one_row_does_not_suit_batch_norm(tmp_path: Path) -> None:
    report = tried(
        IMAGES, {**DIGITS, "pixel_values": ("F32", (1, 2, 2), None)}, directory(tmp_path, RESNET), rows=1
    )
    assert report.outcome == "failed"
    assert "rounds.batch_size to 2 or more" in report.reason


def test_columns_that_the_model_does_not_take_are_named(tmp_path: Path) -> None:
    report = tried(odd("Classifier"), {**ROWS, "id": ("I64", (), None)})
    assert report.outcome == "passed"
    assert report.notes == ("the model does not use the column id; its forward takes x, labels",)


def test_what_is_of_this_machine_alone_judges_nothing(tmp_path: Path) -> None:
    absent = tried(ModelSpec(task="torch", entrypoint="not_installed.models:Model"), ROWS)
    remote = tried(ModelSpec(task="causal-lm", trust_remote_code=True), TOKENS, directory(tmp_path, GPT2))
    nowhere = tried(CAUSAL, TOKENS, None)
    lacks = tried(odd("Imports"), ROWS)
    sparse = tried(odd("Constants"), ROWS)
    newer = tried(IMAGES, DIGITS, directory(tmp_path / "newer", {"model_type": "of-next-year"}))
    strange = tried(odd("Classifier"), {**ROWS, "x": ("F8_E4M3", (8,), None)})
    for report, words in (
        (absent, "the package not_installed"),
        (remote, "code of its own"),
        (nowhere, "not on this machine"),
        (lacks, "No module named 'a_package_of_workers'"),
        (newer, "of-next-year"),
        (sparse, "cannot be built without numbers"),
        (tried(odd("Classifier"), {**ROWS, "x": ("F32", (1 << 40,), None)}), "more than 16777216 numbers"),
        (strange, "x is F8_E4M3"),
    ):
        assert report.outcome == "unknown", report
        assert words in report.reason


def test_of_a_large_model_shapes_and_types_are_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trying, "SMALL_PARAMETERS", 0)
    gpt2, vit = directory(tmp_path / "gpt2", GPT2), directory(tmp_path / "vit", VIT)
    for report in (tried(CAUSAL, TOKENS, gpt2), tried(IMAGES, DIGITS, vit), tried(odd("RunningMean"), ROWS)):
        assert (report.outcome, report.shapes_only, report.reason) == ("passed", True, "")
    tokens: Columns = {"input_ids": ("I32", (16,), (0, 128))}
    longer: Columns = {**DIGITS, "pixel_values": ("F32", (1, 16, 16), (0, 1))}
    failed = [
        (tried(CAUSAL, tokens, gpt2), "vocabulary has 128"),
        (tried(IMAGES, {**DIGITS, "labels": ("I64", (), (0, 10))}, vit), "the model has 10 classes"),
        (tried(IMAGES, {**DIGITS, "pixel_values": ("F32", (3, 8, 8), (0, 1))}, vit), "the model takes 1"),
        (tried(IMAGES, longer, vit), "the images are 16x16"),
        (tried(odd("Classifier"), {**ROWS, "x": ("F32", (9,), None)}), "x float32[2, 9]"),
    ]
    for report, words in failed:
        assert report.outcome == "failed", report
        assert words in report.reason


SEGFORMER = {"model_type": "segformer", "num_channels": 1, "num_labels": 3, "decoder_hidden_size": 8} | {
    "depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4
}  # fmt: skip


@pytest.mark.parametrize("largest", [trying.SMALL_PARAMETERS, 0], ids=["numbers", "shapes"])
def test_of_pixels_the_class_that_the_loss_leaves_out_is_none_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(trying, "SMALL_PARAMETERS", largest)
    spec, source = ModelSpec(task="semantic-segmentation"), directory(tmp_path, SEGFORMER)
    images = ("F32", (1, 32, 32), (0, 1))
    passed = tried(spec, {"pixel_values": images, "labels": ("U8", (32, 32), (0, 255))}, source)
    assert (passed.outcome, passed.reason) == ("passed", "")
    failed = tried(spec, {"pixel_values": images, "labels": ("U8", (32, 32), (0, 3))}, source)
    assert failed.outcome == "failed"
    assert "the model has 3 classes" in failed.reason


def test_a_model_that_looks_at_numbers_cannot_be_gone_through_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tried(odd("LooksAtNumbers"), ROWS).outcome == "passed"
    monkeypatch.setattr(trying, "SMALL_PARAMETERS", 0)
    report = tried(odd("LooksAtNumbers"), ROWS)
    assert report.outcome == "unknown"
    assert "without numbers" in report.reason

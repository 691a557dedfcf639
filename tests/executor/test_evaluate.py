"""Figures of exported models, on data as training takes it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.executor.test_models import GPT2, RESNET, directory
from torch import nn
from torch.nn import functional

from hypha.errors import DataError, ModelError
from hypha.executor.evaluate import evaluate, main
from hypha.executor.models import loading as models
from hypha.messages import ModelSpec


def test_pixels_and_labels_are_what_they_are_in_training(tmp_path: Path) -> None:
    spec = ModelSpec(task="image-classification")
    model = models.build(spec, directory(tmp_path / "source", RESNET))
    models.export(model, spec, None, tmp_path / "model")
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        said = model.eval()(pixel_values=pixels.float() / 255).logits.argmax(-1)
    labels = said.clone()
    labels[:10] = (labels[:10] + 1) % 10
    data = tmp_path / "data"
    data.mkdir()
    # bytes, and a column of labels
    save_file({"pixel_values": pixels, "labels": labels[:, None]}, data / "slice-0000.safetensors")
    assert evaluate(tmp_path / "model", data) == {"accuracy": 0.75, "samples": 40}
    save_file({"pixel_values": pixels}, data / "slice-0001.safetensors")
    with pytest.raises(DataError, match="no column of labels"):
        evaluate(tmp_path / "model", data)


BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "num_labels": 3,
}


def exported(path: Path, task: str, config: dict[str, object], **more: object) -> tuple[nn.Module, Path]:
    spec = ModelSpec(task=task, seed=3, **more)  # type: ignore[arg-type]
    model = models.build(spec, directory(path / "source", config))
    models.export(model, spec, None, path / "model")
    return model.eval(), path / "model"


def dataset(path: Path, *slices: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    for number, columns in enumerate(slices):
        save_file(columns, path / f"slice-{number:04}.safetensors")
    return path


def test_the_perplexity_of_a_language_model_is_of_all_tokens_alike(tmp_path: Path) -> None:
    """Also where slices have rows of different lengths, with padding that is marked."""
    model, where = exported(tmp_path, "causal-lm", GPT2)
    long = torch.randint(0, 128, (11, 16), dtype=torch.int16)
    short = torch.randint(0, 128, (3, 6), dtype=torch.int16)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    data = dataset(tmp_path / "data", {"input_ids": long}, {"input_ids": short, "attention_mask": mask})
    with torch.no_grad():
        losses = [
            functional.cross_entropy(
                model(input_ids=rows.long()).logits[:, :-1].flatten(0, 1),
                rows.long()[:, 1:].flatten(),
                reduction="sum",
            )
            for rows in (long, short[:, :4])
        ]
    found = evaluate(where, data)
    assert (found["tokens"], found["samples"]) == (11 * 15 + 3 * 3, 14)
    assert found["loss"] == pytest.approx(float(sum(losses)) / (11 * 15 + 3 * 3), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_a_text_classifier_and_its_class_names(tmp_path: Path) -> None:
    names = ("bad", "fair", "good")
    model, where = exported(tmp_path, "sequence-classification", BERT, class_names=names)
    described = json.loads((where / "config.json").read_text())
    assert described["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert described["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    ids = torch.randint(0, 32, (20, 8), dtype=torch.int32)
    with torch.no_grad():
        said = model(input_ids=ids.long()).logits.argmax(-1)
    labels = said.clone()
    labels[:5] = (labels[:5] + 1) % 3
    data = dataset(tmp_path / "data", {"text": ids, "kind": labels.to(torch.int8)})
    assert evaluate(where, data, {"input_ids": "text", "labels": "kind"}) == {
        "accuracy": 0.75,
        "samples": 20,
    }
    with pytest.raises(DataError, match="none of the columns kind, text"):
        evaluate(where, data)


@pytest.mark.parametrize(
    ("labels", "figures"),
    [
        (torch.tensor([0, 1, 1, 1]), {"accuracy": 0.75, "samples": 4}),
        (torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 1]]), {"mse": 0.125, "mae": 0.125, "samples": 4}),
    ],
)
def test_a_table_with_a_model_of_ones_own(
    tmp_path: Path, labels: torch.Tensor, figures: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    entrypoint = "tests.executor.test_evaluate:identity"
    spec = ModelSpec(task="torch", entrypoint=entrypoint, arguments={"width": 2})
    model = models.build(spec, None)
    models.export(model, spec, None, tmp_path / "model")
    rows = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0]])
    data = dataset(tmp_path / "data", {"inputs": rows, "labels": labels})
    with pytest.raises(ModelError, match=f"to run that code, add --entrypoint {entrypoint}"):
        evaluate(tmp_path / "model", data)
    assert main([str(tmp_path / "model"), str(data), "--entrypoint", entrypoint]) == 0
    assert json.loads(capsys.readouterr().out) == figures


def identity(width: int) -> nn.Module:
    model = nn.Linear(width, width, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(width))
    return model


@pytest.mark.parametrize(
    ("config", "names", "told"),
    [
        ({}, ("a", "b"), "the model has 3 classes and the dataset 2"),
        (
            {"id2label": {"0": "x", "1": "b", "2": "c"}},
            ("a", "b", "c"),
            "class 0 'x' and the dataset 'a'",
        ),
    ],
)
def test_names_of_classes_that_do_not_go_with_the_model_are_told(
    tmp_path: Path, config: dict[str, object], names: tuple[str, ...], told: str
) -> None:
    notes: list[str] = []
    source = directory(tmp_path / "source", {**BERT, **config})
    spec = ModelSpec(task="sequence-classification", class_names=names)
    model = models.build(spec, source, tell=notes.append)
    assert any(told in note for note in notes)
    assert model.config.id2label[0] == ("x" if config else "LABEL_0")
    # of another number of classes the head is fresh, and the dataset's names are its
    fresh = ModelSpec(task="sequence-classification", class_names=names, arguments={"num_labels": len(names)})
    assert models.build(fresh, source).config.id2label[0] == ("x" if config else "a")


def test_several_labels_a_row(tmp_path: Path) -> None:
    config = {**BERT, "problem_type": "multi_label_classification"}
    model, where = exported(tmp_path, "sequence-classification", config)
    ids = torch.randint(0, 32, (4, 8))
    with torch.no_grad():
        labels = (model(input_ids=ids).logits > 0).float()
    labels[0, 0] = 1 - labels[0, 0]
    data = dataset(tmp_path / "data", {"input_ids": ids, "labels": labels})
    found = evaluate(where, data)
    assert found["accuracy"] == pytest.approx(11 / 12)
    assert 0 < found["f1"] < 1

"""Columns and labels as people have them become what the model and its loss need, or are explained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.executor import small_job
from tests.executor.test_models import GPT2, RESNET, directory
from torch import Tensor, nn
from torch.nn import functional

from hypha.errors import BatchFailed, DataError, ModelError
from hypha.executor.models.forward import Forward, loss_of
from hypha.executor.models.loading import build
from hypha.messages import ModelSpec

BERT: dict[str, object] = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "num_labels": 4,
}
IMAGES = ModelSpec(task="image-classification")
TEXTS = ModelSpec(task="sequence-classification")


def tokens(rows: int = 16, length: int = 8) -> Tensor:
    return torch.randint(0, 64, (rows, length), dtype=torch.int16)


def train(path: Path, spec: ModelSpec, config: dict[str, object], **columns: Tensor) -> None:
    rows = len(next(iter(columns.values())))
    small_job.run(path, spec, directory(path / "source", config), [columns] * 6, batch_size=rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.float32, torch.float64])
def test_images_and_classes_of_any_type_are_trained_on(
    tmp_path: Path, dtype: torch.dtype, labels: torch.dtype
) -> None:
    pixels = torch.randint(0, 2, (16, 1, 8, 8)).to(dtype)
    train(tmp_path, IMAGES, RESNET, pixel_values=pixels, labels=torch.randint(0, 10, (16,)).to(labels))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.float64])
@pytest.mark.parametrize("problem", ["multi_label_classification", None])
def test_several_labels_a_row_may_be_of_any_type(
    tmp_path: Path, dtype: torch.dtype, problem: str | None
) -> None:
    labels = torch.randint(0, 2, (16, 4)).to(dtype)
    train(tmp_path, TEXTS, BERT | {"problem_type": problem}, input_ids=tokens(), labels=labels)


@pytest.mark.parametrize("shape", [(16,), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_a_number_a_row_may_be_of_any_type_and_shape(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    labels = torch.randint(0, 9, shape).to(dtype)
    train(tmp_path, TEXTS, BERT | {"num_labels": 1}, input_ids=tokens(), labels=labels)


def test_classes_in_a_column_of_their_own_are_classes(tmp_path: Path) -> None:
    train(tmp_path, TEXTS, BERT, input_ids=tokens(), labels=torch.randint(0, 4, (16, 1)))


class Looks(nn.Module):
    """Takes indices under a name that does not say so, and computes its own loss of floats."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.table = nn.Embedding(9, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        seen = self.table(x) if self.what == "indices" else x
        logits = self.out(self.drop(self.norm(seen))).squeeze(-1)
        return {"loss": functional.binary_cross_entropy_with_logits(logits, labels)}


@pytest.mark.parametrize("what", ["indices", "floats"])
def test_integers_become_what_a_model_of_ones_own_takes(what: str) -> None:
    model = Looks(what)
    shape = (12,) if what == "indices" else (12, 4)
    columns = {"x": torch.randint(0, 9, shape, dtype=torch.uint8), "labels": torch.randint(0, 2, (12,))}
    forward = Forward(model, ModelSpec(task="torch"))
    torch.manual_seed(5)
    loss = forward.loss(model, columns)
    # what was tried before has left nothing behind: neither in torch's generator nor in a buffer
    other = Looks(what)
    other.load_state_dict(model.state_dict())
    other.norm.reset_running_stats()
    torch.manual_seed(5)
    x = columns["x"].long() if what == "indices" else columns["x"].float()
    assert torch.equal(loss, other(x, columns["labels"].float())["loss"])
    assert torch.equal(model.norm.running_mean, other.norm.running_mean)  # type: ignore[arg-type]
    assert int(model.norm.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_a_mistake_in_the_model_itself_is_not_tried_again() -> None:
    class Wrong(Looks):
        calls = 0

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            raise RuntimeError("shapes cannot be multiplied (4x3 and 8x2)")

    model = Wrong("floats")
    with pytest.raises(RuntimeError, match="multiplied"):
        Forward(model, ModelSpec(task="torch")).loss(
            model, {"x": torch.zeros(2, 4), "labels": torch.zeros(2)}
        )
    assert model.calls == 1


def test_cross_entropy_takes_columns_one_hot_rows_and_floats() -> None:
    logits, classes = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    wanted = functional.cross_entropy(logits, classes)
    for labels in (classes[:, None], classes.float(), classes.double()[:, None], functional.one_hot(classes)):
        torch.testing.assert_close(loss_of("cross-entropy", logits, labels), wanted)
    with pytest.raises(DataError, match=r"no whole numbers \(the first is 0\.5\).*model\.loss to mse"):
        loss_of("cross-entropy", logits, classes + 0.5)


@pytest.mark.parametrize(
    ("config", "labels", "words"),
    [
        (
            {},
            torch.arange(16),
            r"run from 0 to 15, but the model has 4 classes, 0 to 3; .*num_labels to .*, 16 at least",
        ),
        ({}, torch.arange(16) % 4 + 1, "run from 1 to 4, but .*number the classes from 0"),
        ({}, torch.arange(16) % 4 - 1, "run from -1 to 2, but .*number the classes from 0"),
        ({}, torch.rand(16), "no whole numbers .*for regression set model.arguments num_labels = 1"),
        ({}, torch.zeros(16, 3), "the labels have 3 columns, .*the model wants 4"),
        (
            {"problem_type": "multi_label_classification"},
            torch.arange(16) % 4,
            "run from 0 to 3, but multi_label_classification takes 0 to 1",
        ),
        (
            {"problem_type": "multi_label_classification"},
            torch.full((16, 4), 3),
            "run from 3 to 3, but multi_label_classification takes 0 to 1",
        ),
    ],
    ids=["too many", "from one", "negative", "real", "columns", "not 0 or 1", "one column"],
)
def test_labels_that_do_not_suit_the_model_are_explained_in_one_line(
    tmp_path: Path, config: dict[str, object], labels: Tensor, words: str
) -> None:
    with pytest.raises(BatchFailed, match=words) as caught:
        train(tmp_path, TEXTS, BERT | config, input_ids=tokens(), labels=labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "config", "columns", "words"),
    [
        (
            "causal-lm",
            GPT2,
            {"input_ids": torch.full((16, 8), 200)},
            r"token ids from 200 to 200, but the model's vocabulary has 128; .*vocab_size = 201",
        ),
        (
            "causal-lm",
            GPT2,
            {"input_ids": torch.zeros(16, 20, dtype=torch.int64)},
            r"rows have 20 tokens, but the model has positions for 16; .*--sequence-length 16",
        ),
        (
            "sequence-classification",
            GPT2 | {"pad_token_id": None},
            {"input_ids": torch.zeros(16, 8, dtype=torch.int64), "labels": torch.zeros(16)},
            "which token is padding; set model.arguments pad_token_id",
        ),
        (
            "image-classification",
            RESNET,
            {"pixel_values": torch.zeros(16, 3, 8, 8), "labels": torch.zeros(16)},
            r"images have 3 channel\(s\), but the model takes 1; .*num_channels = 3",
        ),
    ],
    ids=["vocabulary", "positions", "padding", "channels"],
)
def test_columns_that_do_not_suit_the_model_are_explained_in_one_line(
    tmp_path: Path, task: str, config: dict[str, object], columns: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(BatchFailed, match=words) as caught:
        train(tmp_path, ModelSpec(task=task), config, **columns)
    assert "\n" not in str(caught.value)


def test_what_nobody_can_explain_says_what_the_batch_was(tmp_path: Path) -> None:
    spec = ModelSpec(
        task="torch",
        entrypoint="torch.nn:Linear",
        arguments={"in_features": 5, "out_features": 2},
        inputs={"input": "x", "labels": "y"},
        loss="mse",
    )
    rows = [{"x": torch.zeros(16, 3), "y": torch.zeros(16)}]
    with pytest.raises(BatchFailed, match=r"its columns are .*x float32\[4, 3\], y float32\[4\]"):
        small_job.run(tmp_path, spec, None, rows)


def test_a_classifier_of_ones_own_with_too_few_outputs(tmp_path: Path) -> None:
    spec = ModelSpec(
        task="torch",
        entrypoint="torch.nn:Linear",
        arguments={"in_features": 3, "out_features": 2},
        loss="cross-entropy",
    )
    rows = [{"x": torch.zeros(16, 3), "labels": torch.arange(16)}]
    with pytest.raises(BatchFailed, match=r"has 2 classes, 0 to 1; give it .*, 1\d at least"):
        small_job.run(tmp_path, spec, None, rows)


def test_the_models_own_errors_stay_what_they_are(tmp_path: Path) -> None:
    model = build(ModelSpec(task="torch", entrypoint="torch.nn:Identity"), None)
    with pytest.raises(ModelError, match="name a loss"):
        Forward(model, ModelSpec(task="torch")).loss(
            model, {"input": torch.zeros(1), "labels": torch.zeros(1)}
        )

"""How good is a trained model? ``python -m hypha.executor.evaluate MODEL DATASET`` prints it, in one line of
JSON.

``DATASET`` is a prepared dataset (safetensors slices) with the columns that the model was trained on. The
model is loaded as any user would, with ``from_pretrained``; what is told of it depends on its labels:

- classes, of rows or of tokens: ``{"accuracy": 0.97, "samples": 360}``;
- tokens, of language models: ``{"perplexity": 12.5, "loss": 2.53, "tokens": 4032, "samples": 64}``;
- several labels a row: ``{"accuracy": 0.9, "f1": 0.8, "samples": 100}``, of all labels together;
- numbers: ``{"mse": 0.1, "mae": 0.2, "samples": 100}``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hypha.config.tasks import A_LABEL_A_PLACE, IGNORED, ONE_LABEL_A_ROW, task_of, unknown_task
from hypha.decoding import decode
from hypha.errors import DataError, HyphaError, ModelError, Undecodable
from hypha.executor.inner.slices_reader import read_columns
from hypha.executor.models import loading as models
from hypha.executor.models.forward import Forward
from hypha.messages import ModelSpec

#: rows at a time; of tokens fewer, as each has a number for each word of the vocabulary
BATCH, BATCH_OF_TOKENS = 256, 8
#: tasks whose logits are of the token after each
_NEXT_TOKEN = frozenset(("causal-lm",))
#: and of the token itself
_SAME_TOKEN = frozenset(("masked-lm", "seq2seq-lm"))

Figures = dict[str, float | int]


def evaluate(
    model_directory: Path,
    dataset: Path,
    inputs: Mapping[str, str] | None = None,
    task: str | None = None,
    entrypoint: str | None = None,
) -> Figures:
    """The figures of a model on a dataset. ``inputs`` maps arguments of the model to columns, as a job's
    ``input_names`` do; ``task`` is read from config.json where it is not given. The code of ``entrypoint`` is
    run only where it is the one that config.json names.

    Raises ModelError when the model cannot be loaded, DataError when the columns do not suit it or there is
    nothing to compare with.
    """
    described = _described(model_directory)
    if described.get("task") == "torch":
        model, task = _plain(model_directory, described, entrypoint), "torch"
        spec = ModelSpec(task="torch", inputs=dict(inputs or {}), loss=_loss(dataset, inputs or {}))
    else:
        task = task or task_of(described.get("architectures"))
        if task is None or (wrong := unknown_task(task)) is not None:
            told = "config.json does not say what the model is for" if task is None else wrong
            raise ModelError(f"{model_directory}: {told}; name its task with --task, such as causal-lm")
        model, spec = _load(model_directory, task), ModelSpec(task=task, inputs=dict(inputs or {}))
    model.eval()
    forward, tokens = Forward(model, spec), task in _NEXT_TOKEN | _SAME_TOKEN
    classes = ONE_LABEL_A_ROW | A_LABEL_A_PLACE | {"torch"}
    if not tokens and task not in classes:
        raise ModelError(
            f"there is no figure for models of the task {task}; there are for language models "
            f"and {', '.join(sorted(classes))}"
        )
    found = _Tokens(task in _NEXT_TOKEN) if tokens else _Labels(getattr(model, "config", None))
    with torch.no_grad():
        for batch in _batches(dataset, BATCH_OF_TOKENS if tokens else BATCH):
            forward.check(batch)
            found.add(*forward.logits(model, batch))
    return found.figures(dataset)


class _Tokens:
    """Of language models: the loss of each token, whatever batch it is in. ``next_one``: a logit is of the
    token that follows.
    """

    def __init__(self, next_one: bool) -> None:
        self._next = next_one
        self._samples = self._tokens = 0
        self._loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        if self._next:
            logits, labels = logits[:, :-1], labels[:, 1:]
        labels = labels.long()
        loss = functional.cross_entropy(
            logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        self._loss += float(loss)
        self._tokens += int((labels != IGNORED).sum())
        self._samples += len(labels)

    def figures(self, dataset: Path) -> Figures:
        if not self._tokens:
            raise DataError(f"{dataset}: there is no token to evaluate on")
        loss = self._loss / self._tokens
        # what is too bad for a float is not a number in JSON either
        perplexity = math.exp(min(loss, 700.0))
        return {"perplexity": perplexity, "loss": loss, "tokens": self._tokens, "samples": self._samples}


class _Labels:
    """Of classes, of several labels a row, and of numbers: which it is, the labels tell, and transformers
    itself (``problem_type`` of the model's ``config``), which has read them in training, too.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._samples = self._counted = 0
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._kind = ""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self._samples += len(labels)
        if not labels.is_floating_point():
            self._kind = "classes"
            axis = -1 if logits.shape[:-1] == labels.shape else 1
            if labels.dim() == logits.dim():
                labels = labels.flatten(-2) if labels.shape[-1] == 1 else labels
            counted = labels != IGNORED
            right = (logits.argmax(dim=axis) == labels) & counted
            self._counted += int(counted.sum())
            self._sums[0] += float(right.sum())
            return
        labels = labels.reshape(logits.shape).double()
        self._counted += labels.numel()
        if getattr(self._config, "problem_type", None) == "multi_label_classification":
            self._kind = "several"
            said, meant = logits > 0, labels > 0.5
            found = ((said == meant).sum(), (said & meant).sum(), said.sum() + meant.sum())
            self._sums += torch.tensor([float(one) for one in found], dtype=torch.float64)
        else:
            self._kind = "numbers"
            difference = logits.double() - labels
            self._sums[0] += float(difference.square().sum())
            self._sums[1] += float(difference.abs().sum())

    def figures(self, dataset: Path) -> Figures:
        if not self._counted:
            raise DataError(f"{dataset}: there is no sample to evaluate on")
        first, second, third = self._sums.tolist()
        if self._kind == "numbers":
            return {
                "mse": first / self._counted,
                "mae": second / self._counted,
                "samples": self._samples,
            }
        figures: Figures = {"accuracy": first / self._counted}
        if self._kind == "several":
            figures["f1"] = 2 * second / third if third else 1.0
        return figures | {"samples": self._samples}


def _batches(dataset: Path, rows: int) -> Iterator[dict[str, Tensor]]:
    for path in sorted(dataset.glob("*.safetensors")):
        columns = read_columns(path)
        for start in range(0, len(next(iter(columns.values()))), rows):
            yield {name: column[start : start + rows] for name, column in columns.items()}


def _described(directory: Path) -> dict[str, object]:
    path = directory / "config.json"
    try:
        content = decode(json.loads, path.read_bytes())
    except OSError as exc:
        raise ModelError(f"{path} cannot be read: {exc.strerror}; is {directory} a trained model?") from exc
    except Undecodable as exc:
        raise ModelError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise ModelError(f"{path} should be a JSON object")
    return content


def _load(directory: Path, task: str) -> nn.Module:
    auto = models.auto_class(task)
    try:
        model = auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise ModelError(f"the model in {directory} cannot be loaded: {exc}") from exc
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model in {directory} is a {type(model).__name__}")
    return model


def _plain(directory: Path, described: Mapping[str, object], entrypoint: str | None) -> nn.Module:
    named, arguments = described.get("entrypoint"), described.get("arguments")
    if not isinstance(named, str) or named != entrypoint:
        raise ModelError(
            f"the model in {directory} is built by {named}; to run that code, add --entrypoint {named}"
        )
    spec = ModelSpec(
        task="torch", entrypoint=named, arguments=dict(arguments) if isinstance(arguments, dict) else {}
    )
    return models.build(spec, directory)


def _loss(dataset: Path, inputs: Mapping[str, str]) -> Literal["cross-entropy", "mse"]:
    """Of a plain model, whose training is not described here: what its labels are tells enough."""
    first = next(_batches(dataset, 1), {})
    column = inputs.get("labels") or next((name for name in ("labels", "label") if name in first), "")
    labels = first.get(column)
    if labels is None:
        raise DataError(f"{dataset}: it has no column labels; --input labels=NAME names another")
    return "mse" if labels.is_floating_point() else "cross-entropy"


def main(arguments: list[str]) -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--task", help="the model's, such as causal-lm, where config.json does not say it")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        help="ARGUMENT=COLUMN, as in input_names; may be repeated",
    )
    parser.add_argument("--entrypoint", help="package.module:callable of a plain PyTorch model, to be run")
    options = parser.parse_args(arguments)
    inputs = dict(text.partition("=")[::2] for text in options.input)
    if not all(inputs.values()):
        parser.error("write --input ARGUMENT=COLUMN")
    try:
        found = evaluate(options.model, options.dataset, inputs, options.task, options.entrypoint)
    except HyphaError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

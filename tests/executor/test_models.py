"""Models: every task's class, tied weights, fresh heads, batches, losses, exports."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hypha.config.tasks import ALIASES, TASKS
from hypha.errors import DataError, ModelError
from hypha.executor.files import tensors
from hypha.executor.files.theta import theta_of
from hypha.executor.models import loading as models
from hypha.executor.models.forward import Forward, loss_of
from hypha.executor.models.loading import build
from hypha.executor.models.preprocessing import Preprocessor
from hypha.messages import Local, ModelSpec, PreprocessorSpec

GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 128,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
RESNET = {
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": 10,
}


def directory(path: Path, config: dict[str, object]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_has_a_class(task: str) -> None:
    assert models.auto_class(task).__name__ == TASKS[task]


def test_other_spellings_and_unknown_tasks() -> None:
    for alias, task in ALIASES.items():
        assert models.auto_class(alias) is models.auto_class(task)
    with pytest.raises(ModelError, match="there is no task poetry; known are torch, audio"):
        models.auto_class("poetry")
    assert models.auto_class("table-question-answering") is not models.auto_class("question-answering")


def test_a_class_that_this_transformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "telepathy", "AutoModelForTelepathy")
    with pytest.raises(ModelError, match="has no AutoModelForTelepathy for the task telepathy"):
        models.auto_class("telepathy")


def test_a_tied_language_model_travels_as_theta_and_comes_out_whole(tmp_path: Path) -> None:
    spec = ModelSpec(task="causal-lm", seed=1)
    source = directory(tmp_path / "source", GPT2)
    server, worker = build(spec, source), build(ModelSpec(task="causal-lm", seed=2), source, weights=False)
    theta = theta_of(server)
    assert "transformer.wte.weight" in theta.parameters
    assert "lm_head.weight" not in theta.parameters
    written = tensors.write(tmp_path / "theta", theta.all())
    local = theta_of(worker)
    base = local.copy()
    assert tensors.read(tmp_path / "theta", base.all()) == written
    local.assign(base)
    assert worker.lm_head.weight is worker.transformer.wte.weight
    assert tensors.write(tmp_path / "again", theta_of(worker).all()) == written
    ids = torch.arange(10).view(2, 5)
    server.eval(), worker.eval()
    assert torch.equal(server(input_ids=ids).logits, worker(input_ids=ids).logits)

    from transformers import AutoModelForCausalLM

    assert "config.json" in models.export(server, spec, source, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded(input_ids=ids).logits, server(input_ids=ids).logits)


def test_a_head_for_other_labels_is_fresh_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    task = "image-classification"
    source = directory(tmp_path / "source", RESNET)
    models.export(build(ModelSpec(task=task), source), ModelSpec(task=task), None, tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    spec = ModelSpec(task=task, seed=3, arguments={"num_labels": 4})
    fresh = build(spec, tmp_path / "trained").state_dict()
    heads = [name for name in fresh if fresh[name].shape != trained[name].shape]
    assert heads == ["classifier.1.weight", "classifier.1.bias"]
    assert fresh["classifier.1.weight"].shape[0] == 4
    assert all(torch.equal(fresh[name], trained[name]) for name in fresh.keys() - set(heads))
    again = build(spec, tmp_path / "trained").state_dict()
    assert torch.equal(again["classifier.1.weight"], fresh["classifier.1.weight"])
    models.export(build(spec, tmp_path / "trained"), spec, None, tmp_path / "exported")
    assert len(json.loads((tmp_path / "exported" / "config.json").read_text())["id2label"]) == 4
    for name in ("trust_remote_code", "_attn_implementation", "device_map"):
        with pytest.raises(ModelError, match=name):
            build(ModelSpec(task=task, arguments={name: True}), tmp_path / "trained")


def test_a_fresh_head_follows_from_the_seed_and_weights_are_used_when_there_are_some(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", RESNET)
    spec = ModelSpec(task="image-classification", seed=3)
    first = build(spec, source)
    models.export(first, spec, None, tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    names = {str(index): f"class {index}" for index in range(4)}
    config |= {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}
    # another number of classes: the head of the checkpoint cannot be used
    weights = load_file(tmp_path / "trained" / "model.safetensors")
    other = directory(tmp_path / "other", config)
    from safetensors.torch import save_file

    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(kept, other / "model.safetensors", metadata={"format": "pt"})
    one, two = build(spec, other), build(spec, other)
    third = build(ModelSpec(task="image-classification", seed=4), other)
    head = "classifier.1.weight"
    assert one.get_parameter(head).shape == (4, 8)
    assert torch.equal(one.get_parameter(head), two.get_parameter(head))
    assert not torch.equal(one.get_parameter(head), third.get_parameter(head))
    body = "resnet.embedder.embedder.convolution.weight"
    assert torch.equal(one.get_parameter(body), first.get_parameter(body))
    assert torch.equal(third.get_parameter(body), first.get_parameter(body))


def test_sources_that_hold_no_model_are_explained(tmp_path: Path) -> None:
    spec = ModelSpec(task="causal-lm")
    with pytest.raises(ModelError, match=r"config\.json"):
        build(spec, None)
    with pytest.raises(ModelError, match="AutoModelForCausalLM cannot load"):
        build(spec, directory(tmp_path / "a", {"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="cannot load"):
        build(ModelSpec(task="audio-classification"), directory(tmp_path / "b", RESNET))
    with pytest.raises(ModelError, match="no files"):
        models.directory_of([])


@pytest.mark.parametrize(
    ("entrypoint", "words"),
    [
        (None, "needs an entrypoint"),
        ("torch.nn.Linear", "needs an entrypoint"),
        ("no_such_package:model", "No module named"),
        ("torch.nn:NoSuchClass", "NoSuchClass"),
        ("torch.nn:Linear", "missing"),
        ("builtins:dict", "returned a dict"),
        # what a package has imported is not its own, and is reached neither by its name nor by a walk
        ("hypha.executor.models.loading:shutil.rmtree", "no attribute 'shutil.rmtree'"),
        ("hypha.executor.models.loading:shutil", "a module; an entrypoint is a class or a function"),
        ("hypha.executor.models.loading:save_model", r"defined in safetensors.torch, not in hypha"),
        ("hypha.executor.models.loading:TASKS", "a dict; an entrypoint is"),
    ],
)
def test_entrypoints_that_build_nothing_are_explained(entrypoint: str | None, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(ModelSpec(task="torch", entrypoint=entrypoint), None)


REMOTE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import {kind}
class Mine({kind}):
    model_type = "mine"
"""


@pytest.mark.parametrize("what", ["model", "known", "preprocessor"])
def test_code_of_a_model_does_not_run_unless_it_is_trusted(tmp_path: Path, what: str) -> None:
    mark = tmp_path / "ran"
    kinds = {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
    mine: dict[str, object] = {"auto_map": kinds, "tokenizer_class": "Mine"}
    source = directory(tmp_path / "source", (GPT2 if what == "known" else {"model_type": "mine"}) | mine)
    (source / "tokenizer_config.json").write_text(json.dumps(mine))
    kind = "PreTrainedTokenizer" if what == "preprocessor" else "PretrainedConfig"
    (source / "mine.py").write_text(REMOTE.format(mark=str(mark), kind=kind))
    with contextlib.suppress(ModelError):
        if what == "preprocessor":
            Preprocessor(PreprocessorSpec(kind="tokenizer", source=Local(url=str(source))), source)
        else:
            build(ModelSpec(task="causal-lm"), source)
    assert not mark.exists()
    if what == "model":
        with contextlib.suppress(ModelError):
            build(ModelSpec(task="causal-lm", trust_remote_code=True), source)
        assert mark.exists()


def test_a_torch_model_is_exported_and_found_again(tmp_path: Path) -> None:
    made = {"entrypoint": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 1}}
    spec, other = ModelSpec(task="torch", **made), ModelSpec(task="torch", seed=9, **made)  # type: ignore[arg-type]
    model = build(spec, None)
    assert models.export(model, spec, None, tmp_path) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["arguments"] == spec.arguments
    again, fresh = build(other, tmp_path), build(other, None)
    assert torch.equal(again.get_parameter("weight"), model.get_parameter("weight"))
    assert not torch.equal(fresh.get_parameter("weight"), model.get_parameter("weight"))


def test_a_preprocessors_files_go_with_the_exported_model(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", GPT2)
    (source / "tokenizer.json").write_text("{}")
    spec = ModelSpec(task="causal-lm")
    model = build(spec, source, weights=False)
    (source / "model.safetensors").write_bytes(b"old")
    names = models.export(model, spec, source, tmp_path / "out")
    assert "tokenizer.json" in names
    assert load_file(tmp_path / "out" / "model.safetensors")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layer(pixels)


def test_columns_find_their_arguments() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    model = Plain()
    named = Forward(
        model, ModelSpec(task="torch", loss="cross-entropy", inputs={"pixels": "a", "labels": "b"})
    )
    single = Forward(model, ModelSpec(task="torch", loss="cross-entropy"))
    wanted = nn.functional.cross_entropy(model(x), y.long())
    assert torch.equal(named.loss(model, {"a": x, "b": y, "other": y}), wanted)
    # the only argument takes the only column that is no label, whatever they are called
    assert torch.equal(single.loss(model, {"whatever": x, "label": y}), wanted)
    assert torch.equal(single.loss(model, {"pixels": x, "labels": y, "id": y}), wanted)
    with pytest.raises(DataError, match="no column a"):
        named.loss(model, {"pixels": x})
    with pytest.raises(DataError, match="input names"):
        single.loss(model, {"u": x, "v": x, "label": y})
    with pytest.raises(DataError, match="needs a column labels"):
        single.loss(model, {"pixels": x})
    with pytest.raises(ModelError, match="name a loss"):
        Forward(model, ModelSpec(task="torch")).loss(model, {"pixels": x, "labels": y})


def test_a_causal_model_predicts_its_own_input_but_no_padding(tmp_path: Path) -> None:
    spec = ModelSpec(task="causal-lm")
    model = build(spec, directory(tmp_path, GPT2)).eval()
    ids = torch.arange(12, dtype=torch.int32).view(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3:] = 0
    loss = Forward(model, spec).loss(model, {"input_ids": ids, "attention_mask": mask})
    labels = ids.long().masked_fill(mask == 0, -100)
    wanted = model(input_ids=ids.long(), attention_mask=mask, labels=labels).loss
    assert torch.equal(loss, wanted)


def test_bytes_of_pixels_are_scaled(tmp_path: Path) -> None:
    spec = ModelSpec(task="image-classification")
    model = build(spec, directory(tmp_path, RESNET)).eval()
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    loss = Forward(model, spec).loss(model, {"pixel_values": pixels, "label": torch.tensor([1, 2])})
    wanted = model(pixel_values=pixels.float() / 255, labels=torch.tensor([1, 2])).loss
    assert torch.equal(loss, wanted)


def test_losses() -> None:
    logits, classes = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    flat = nn.functional.cross_entropy(logits.view(10, 3), classes.view(10))
    assert torch.equal(loss_of("cross-entropy", logits, classes), flat)
    image, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    assert torch.equal(loss_of("cross-entropy", image, mask), nn.functional.cross_entropy(image, mask))
    column, values = torch.randn(6, 1), torch.randn(6)
    assert torch.equal(loss_of("mse", column, values), ((column[:, 0] - values) ** 2).mean())
    assert torch.equal(loss_of("l1", column, values), (column[:, 0] - values).abs().mean())
    truth = torch.tensor([0, 1, 1, 0, 1, 0])
    wanted = nn.functional.binary_cross_entropy_with_logits(column[:, 0], truth.float())
    torch.testing.assert_close(loss_of("bce-with-logits", column, truth), wanted)
    with pytest.raises(DataError, match="do not fit"):
        loss_of("mse", torch.zeros(2, 3), torch.zeros(2))

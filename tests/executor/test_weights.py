"""Weights as people have them: used, or refused by name; never silently left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.executor import small_job
from tests.executor.test_models import GPT2, RESNET, directory
from torch import Tensor

from hypha.errors import ModelError
from hypha.executor.files import tensors
from hypha.executor.files.theta import theta_of
from hypha.executor.models import loading as models
from hypha.executor.models.loading import build
from hypha.executor.models.model_tensors import check_same_model
from hypha.messages import ModelSpec

CAUSAL = ModelSpec(task="causal-lm", seed=1)
IMAGES = ModelSpec(task="image-classification", seed=1)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pretrained(path: Path, config: dict[str, object] = GPT2, spec: ModelSpec = CAUSAL) -> Path:
    """A source with weights."""
    models.export(build(spec, directory(path / "fresh", config)), spec, None, path / "trained")
    return path / "trained"


def changed(source: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    file = source / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "model.", "a.b."])
def test_keys_with_a_prefix_are_named_and_what_to_do_about_them(tmp_path: Path, prefix: str) -> None:
    source = pretrained(tmp_path)
    changed(source, lambda weights: {prefix + name: value for name, value in weights.items()})
    with pytest.raises(ModelError) as caught:
        build(CAUSAL, source)
    text = str(caught.value)
    assert "\n" not in text
    assert "transformer.h.0" in text
    assert "and 2" in text, "how many more there are"
    assert f"{prefix}transformer" in text
    assert f"its keys begin with '{prefix}'" in text


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    changed(source, lambda weights: {name: weights[name] for name in weights if ".h.1." not in name})
    with pytest.raises(ModelError, match=r"12 of \d+ tensors are not in it .*transformer\.h\.1\.attn"):
        build(CAUSAL, source)


def test_a_fresh_head_is_told_and_a_body_of_another_size_is_no_head(tmp_path: Path) -> None:
    source = pretrained(tmp_path, RESNET, IMAGES)
    notes: list[str] = []
    fresh = ModelSpec(task="image-classification", arguments={"num_labels": 4})
    build(fresh, source, tell=notes.append)
    assert len(notes) == 1
    assert "fresh, from the seed: classifier.1.bias, classifier.1.weight" in notes[0]
    config = json.loads((source / "config.json").read_text())
    labels = {str(number): str(number) for number in range(4)}
    edited = directory(tmp_path / "edited", config | {"id2label": labels, "label2id": labels})
    (edited / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(
        ModelError, match=r"classifier\.1\.weight have another shape .*set model.arguments num_labels"
    ):
        build(IMAGES, edited)
    body = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    changed(source, lambda weights: weights | {body: torch.zeros(16, 4, 3, 3)})
    with pytest.raises(ModelError, match=rf"1 of \d+ tensors have another shape there \({body}\)"):
        build(fresh, source)


def test_a_pooler_that_was_never_published_is_told(tmp_path: Path) -> None:
    config: dict[str, object] = {"model_type": "bert", "vocab_size": 32, "hidden_size": 8}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    spec = ModelSpec(task="sequence-classification")
    source = pretrained(tmp_path, config, spec)
    changed(source, lambda weights: {name: weights[name] for name in weights if "pooler" not in name})
    notes: list[str] = []
    build(spec, source, tell=notes.append)
    assert len(notes) == 1
    assert "fresh, from the seed: bert.pooler.dense.bias, bert.pooler.dense.weight" in notes[0]


def test_weights_that_the_model_has_no_use_for_are_told(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    changed(source, lambda weights: weights | {"transformer.extra.weight": torch.zeros(2)})
    notes: list[str] = []
    build(CAUSAL, source, tell=notes.append)
    assert notes == ["the model has no use for transformer.extra.weight of model.safetensors"]
    notes.clear()
    build(CAUSAL, tmp_path / "fresh", tell=notes.append)
    assert notes == ["the model's source holds no weights: it is trained from scratch, from the seed 1"]


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.00.pth",
        "original/consolidated.00.pth",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "last.ckpt",
        "weights.bin",
        "model-00001-of-00002.safetensors",
        "adapter_model.safetensors",
        "checkpoint-500/model.safetensors",
        "onnx/model.onnx",
    ],
)
def test_weights_in_another_form_are_named_not_left_out(tmp_path: Path, name: str) -> None:
    source = directory(tmp_path / "source", GPT2)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b"weights")
    with pytest.raises(ModelError, match=f"weights that are not read: {name}"):
        build(CAUSAL, source)


def test_what_a_trainer_leaves_beside_the_weights_is_no_weights(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", GPT2)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        (source / name).write_bytes(b"state")
    build(CAUSAL, source)


def test_a_missing_shard_and_a_pointer_are_named(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    weights = source / "model.safetensors"
    files = dict.fromkeys(load_file(weights), "model-00001-of-00002.safetensors")
    index = {
        "metadata": {},
        "weight_map": files | {"transformer.wte.weight": "model-00002-of-00002.safetensors"},
    }
    weights.rename(source / "model-00001-of-00002.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names 2 files of weights, .* lacks model-00002-of"):
        build(CAUSAL, source)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(ModelError, match=r"model\.safetensors is a pointer of Git LFS"):
        build(CAUSAL, source)


def test_a_torch_models_weights_are_read_or_refused(tmp_path: Path) -> None:
    spec = ModelSpec(
        task="torch", entrypoint="torch.nn:Linear", arguments={"in_features": 2, "out_features": 1}
    )
    (tmp_path / "model.pt").write_bytes(b"weights")
    with pytest.raises(ModelError, match=r"are not read: model\.pt.*read from model\.safetensors"):
        build(spec, tmp_path)


def two_matrices(path: Path, config: dict[str, object]) -> Path:
    """A source whose configuration ties the embeddings, and whose weights hold two of them."""
    source = pretrained(path, config)
    inputs = "model.embed_tokens.weight" if config is LLAMA else "transformer.wte.weight"
    return changed(source, lambda weights: weights | {"lm_head.weight": weights[inputs].flip(0).clone()})


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_two_matrices_for_one_that_is_tied_are_two_for_all(tmp_path: Path, config: dict[str, object]) -> None:
    source = two_matrices(tmp_path, config)
    ids = [{"input_ids": torch.randint(0, 32, (16, 8))} for _ in range(2)]
    result = small_job.run(tmp_path, CAUSAL, source, ids)
    assert any("tie_word_embeddings = false" in note for note in result.notes)
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(result.output)
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    for name, value in theta_of(result.model).parameters.items():
        assert torch.equal(loaded.get_parameter(name), value), name
    # a parameter server that goes on from a checkpoint builds it once more, without the weights
    resumed = theta_of(build(CAUSAL, source, weights=False))
    assert resumed.specs() == theta_of(result.model).specs()


def test_two_equal_matrices_are_one(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    changed(source, lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()})
    server, trainer = build(CAUSAL, source), build(CAUSAL, source, weights=False)
    assert theta_of(server).specs() == theta_of(trainer).specs()
    assert "lm_head.weight" not in theta_of(server).parameters


def test_a_worker_with_another_model_says_what_differs_before_it_trains(tmp_path: Path) -> None:
    theta = theta_of(build(CAUSAL, directory(tmp_path / "a", GPT2)))
    tensors.write(tmp_path / "theta.safetensors", theta.all())
    other = build(CAUSAL, directory(tmp_path / "b", GPT2 | {"n_embd": 16}))
    with pytest.raises(
        ModelError, match=r"another model than this worker: .*where the model has F32\[128, 16\]"
    ):
        check_same_model(tmp_path / "theta.safetensors", theta_of(other))


def test_every_file_of_the_source_is_exported_but_weights_and_what_is_hidden(tmp_path: Path) -> None:
    source = pretrained(tmp_path)
    own = {
        "generation_config.json": '{"temperature": 0.25}',
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "preprocessor_config.json": "{}",
        "modeling_own.py": "",
        "LICENSE": "as it says",
        "README.md": "license: as it says",
        "1_Pooling/config.json": "{}",
    }
    left = ["pytorch_model.bin", "original/consolidated.00.pth", ".gitattributes", "optimizer.pt"]
    for name, text in [*own.items(), *((name, "not this") for name in left)]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    # as when the job goes on from a checkpoint, with a parameter server that never had the weights
    model = build(CAUSAL, source, weights=False)
    names = models.export(model, CAUSAL, source, tmp_path / "out")
    assert set(names) == {*own, "config.json", "model.safetensors"}
    for name, text in own.items():
        assert (tmp_path / "out" / name).read_text() == text

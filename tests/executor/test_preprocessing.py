"""Preprocessors over the columns of a slice: tokens, padding, truncation, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.executor import small_job
from tests.executor.test_models import GPT2, directory
from torch import Tensor

from hypha.errors import BatchFailed, ModelError
from hypha.executor.models.preprocessing import Preprocessor
from hypha.messages import Local, ModelSpec, PreprocessorSpec

WORDS = {"[PAD]": 0, "[UNK]": 1, "good": 2, "day": 3, "night": 4, "[END]": 5}


def tokenizer(path: Path, **options: Any) -> Path:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(kinds.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, **({"pad_token": "[PAD]"} | options))
    made.save_pretrained(path)
    return path


def column(*texts: str) -> Tensor:
    made = torch.zeros(len(texts), 64, dtype=torch.uint8)
    for row, text in zip(made, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return made


def spec(path: Path, **inputs: str) -> PreprocessorSpec:
    return PreprocessorSpec(
        kind="tokenizer", source=Local(url=str(path)), inputs=inputs or {"text": "sentence"}
    )


def test_a_tokenizer_turns_bytes_into_ids(tmp_path: Path) -> None:
    preprocess = Preprocessor(spec(tmp_path), tokenizer(tmp_path))
    made = preprocess({"sentence": column("good day", "day"), "label": torch.tensor([0, 1])})
    assert made["input_ids"].tolist() == [[2, 3], [3, 0]]
    assert made["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert made["label"].tolist() == [0, 1]
    assert "sentence" not in made
    with pytest.raises(BatchFailed, match="sentence"):
        preprocess({"label": torch.tensor([0, 1])})
    with pytest.raises(ModelError, match="preprocessor"):
        Preprocessor(spec(tmp_path), tmp_path / "nowhere")


def test_without_a_padding_token_the_end_stands_in_and_with_neither_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = tokenizer(tmp_path / "ended", pad_token=None, eos_token="[END]")
    preprocess = Preprocessor(spec(ended), ended)
    made = preprocess({"sentence": column("good day", "day")})
    assert made["input_ids"].tolist() == [[2, 3], [3, 5]]
    assert made["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert preprocess.padding.token == 5
    assert "[END] stands in for it" in caplog.text
    bare = tokenizer(tmp_path / "bare", pad_token=None)
    with pytest.raises(ModelError, match=r"no padding token.*tokenizer_config\.json"):
        Preprocessor(spec(bare), bare)


def test_texts_that_are_cut_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    preprocess = Preprocessor(spec(tmp_path), tokenizer(tmp_path, model_max_length=3))
    for _ in range(2):
        made = preprocess({"sentence": column("good day good day", "day")})
        assert made["input_ids"].tolist() == [[2, 3, 2], [3, 0, 0]]
    assert caplog.text.count("more than 3 tokens are cut") == 1


def test_padding_of_targets_is_not_learnt(tmp_path: Path) -> None:
    preprocess = Preprocessor(spec(tmp_path, text="a", text_target="b"), tokenizer(tmp_path))
    made = preprocess({"a": column("good", "good day"), "b": column("night", "good night")})
    assert made["labels"].tolist() == [[4, -100], [2, 4]]
    assert made["input_ids"].tolist() == [[2, 0], [2, 3]]


def test_what_a_preprocessor_does_not_take_is_said_in_one_line(tmp_path: Path) -> None:
    preprocess = Preprocessor(spec(tmp_path, no_such_thing="a"), tokenizer(tmp_path))
    with pytest.raises(
        BatchFailed, match=r"cannot work on the columns a: .*preprocessor\.input_names"
    ) as caught:
        preprocess({"a": column("good")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_job_on_texts_of_different_lengths_is_trained(tmp_path: Path, side: str) -> None:
    made = tokenizer(tmp_path / "tokenizer", padding_side=side)
    slices = [
        {"sentence": column(*["good day"] * 6)},
        {"sentence": column(*["good day good night day"] * 6)},
        {"sentence": column(*["day"] * 6)},
    ]
    source = directory(tmp_path / "source", GPT2)
    result = small_job.run(
        tmp_path, ModelSpec(task="causal-lm"), source, slices, spec(made), made, batch_size=3
    )
    assert len(set(result.hashes)) == small_job.ROUNDS + 1
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(result.files)

"""Text that is cut into sequences: all of it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from tests.data.sources.running import refused, run, told
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = [f"w{number}" for number in range(50)]


def tokenizer(directory: Path, truncation: int | None, padding: int | None) -> str:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if truncation is not None:
        made.enable_truncation(truncation)
    if padding is not None:
        made.enable_padding(length=padding)
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    return str(directory)


@pytest.mark.parametrize(("truncation", "padding"), [(None, None), (8, None), (None, 64), (8, 8)])
def test_no_token_is_cut_off_or_added(tmp_path: Path, truncation: int | None, padding: int | None) -> None:
    (tmp_path / "in").mkdir()
    expected = []
    for number in range(10):
        ids = [(number + i) % 50 for i in range(37)]
        (tmp_path / "in" / f"{number}.txt").write_text(" ".join(WORDS[i] for i in ids))
        expected += [i + 1 for i in ids]
    name = tokenizer(tmp_path / "tokenizer", truncation, padding)
    done, back = run(tmp_path, tmp_path / "in", tokenizer=name, sequence_length=16)
    assert back["input_ids"].reshape(-1).tolist() == expected[:368]
    notes = str(done.notes)
    assert ("cuts texts after 8 ids; that is turned off" in notes) == (truncation is not None)
    assert ("pads texts; that is turned off" in notes) == (padding is not None)
    assert "2 tokens at the end" in told(done, "too few for a sequence")


def test_an_end_of_text_token_that_the_tokenizer_does_not_know_is_told(tmp_path: Path) -> None:
    name = tokenizer(tmp_path / "tokenizer", None, None)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "in.txt").write_text("w1 w2 w3 w4")
    done, _ = run(tmp_path, tmp_path / "in.txt", tokenizer=name, sequence_length=2)
    assert "none stands between documents" in told(done, "'</s>'")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_texts_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "in.txt").write_bytes("Zürich\r\nGenève".encode(encoding))
    if encoding == "latin-1":
        said = refused(tmp_path, tmp_path / "in.txt", tokenizer="bytes")
        assert "in.txt is not UTF-8 text; byte 2 of line 1 is 0xfc" in said
    asked = "latin-1" if encoding == "latin-1" else None
    _, back = run(tmp_path, tmp_path / "in.txt", tokenizer="bytes", sequence_length=2, encoding=asked)
    assert bytes(back["input_ids"].reshape(-1).tolist()).decode() == "Zürich\r\nGenève"


def test_compressed_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"some text"))
    (tmp_path / "in" / "b.txt").write_bytes(b"")
    done, back = run(tmp_path, tmp_path / "in", tokenizer="bytes", sequence_length=3)
    assert bytes(back["input_ids"].reshape(-1).tolist()) == b"some text"
    assert "1 files are empty (b.txt)" in told(done, "empty")
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"some text")[:-6])
    assert "a.txt.gz cannot be read" in refused(tmp_path, tmp_path / "in", tokenizer="bytes")


def test_texts_of_a_table_with_decimal_commas(tmp_path: Path) -> None:
    rows = [f"{i},5;text number {i}" for i in range(60)]
    (tmp_path / "in.csv").write_text("x;body\n" + "\n".join(rows))
    done, back = run(tmp_path, tmp_path / "in.csv", tokenizer="bytes", sequence_length=8)
    assert bytes(back["input_ids"].reshape(-1).tolist()).startswith(b"text number 0text number 1")
    assert "--text-column" in told(done, "the only column of text is 'body'")
    assert "the columns x are left out" in told(done, "cut into sequences")

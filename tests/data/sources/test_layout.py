"""What is data in a directory, and what is not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.data.sources.running import refused, run, told

from hypha.data import PrepareOptions, prepare

JUNK = {
    "README.md": "documentation",
    "LICENSE": "documentation",
    "LICENSE-APACHE.txt": "documentation",
    "CITATION.cff": "documentation",
    ".gitattributes": "hidden",
    ".DS_Store": "hidden",
    "Thumbs.db": "of the operating system",
    "desktop.ini": "of the operating system",
    "dataset_infos.json": "a description of the dataset",
}


def snapshot(directory: Path) -> Path:
    """A dataset as the hub's client downloads it."""
    (directory / "data").mkdir(parents=True)
    (directory / ".cache" / "huggingface").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "x.csv").write_text("x\n9\n")
    for name in JUNK:
        (directory / name).write_text("This text is about the data, and is none of it. " * 50)
    for split, count, shards in (("train", 20, 2), ("test", 6, 1)):
        for shard in range(shards):
            rows = range(shard, count, shards)
            table = pa.table({"x": list(rows), "text": [f"{split} {row}" for row in rows]})
            name = f"{split}-{shard:05}-of-{shards:05}.parquet"
            pyarrow.parquet.write_table(table, directory / "data" / name)
    return directory


def test_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    done, back = run(tmp_path, snapshot(tmp_path / "in"))
    assert sorted(back["x"].tolist()) == list(range(20))
    assert done.labels is not None
    assert all(text.startswith("train ") for text in done.labels["text"])
    assert "--split" in told(done, "the split train is taken")
    ignored = dict(reversed(line[:-1].rsplit(" (", 1)) for line in done.summary.ignored)
    assert set(ignored) == {*JUNK.values(), "of the split test"}
    assert ignored["documentation"] == "4 such as CITATION.cff, LICENSE"
    assert ignored["of the split test"] == "data/test-00000-of-00001.parquet"
    _, back = run(tmp_path, tmp_path / "in", split="test")
    assert back["x"].tolist() == list(range(6))


def test_the_texts_of_a_snapshot_are_trained_on_and_its_readme_is_not(tmp_path: Path) -> None:
    _, back = run(tmp_path, snapshot(tmp_path / "in"), tokenizer="bytes", sequence_length=8)
    text = bytes(back["input_ids"].reshape(-1).tolist()).decode()
    expected = "".join(f"train {row}" for rows in (range(0, 20, 2), range(1, 20, 2)) for row in rows)
    assert text == expected[: len(expected) // 8 * 8]


def test_documentation_may_be_meant(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("some words to train on")
    said = refused(tmp_path, tmp_path / "in", tokenizer="bytes")
    assert "README.md (documentation); name such a file itself to use it" in said
    assert "README.md (documentation)" in refused(tmp_path, tmp_path / "in", tokenizer="bytes", kind="text")
    _, back = run(tmp_path, tmp_path / "in" / "README.md", tokenizer="bytes", sequence_length=4)
    assert bytes(back["input_ids"][0].tolist()) == b"some"


def test_files_beside_text_and_tables(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.csv").write_text("x\n1\n")
    (tmp_path / "in" / "config.json").write_text("{}")
    (tmp_path / "in" / "settings.json").write_text("{}")
    (tmp_path / "in" / "about.md").write_text("about")
    (tmp_path / "in" / "script.py").write_text("print()")
    done, back = run(tmp_path, tmp_path / "in")
    assert back["x"].tolist() == [1]
    assert sorted(done.summary.ignored) == [
        "about.md, script.py, settings.json (not CSV files)",
        "config.json (a description of the dataset)",
    ]


@pytest.mark.parametrize(
    ("name", "advice"),
    [("table.xlsx", "save it as CSV"), ("data.zip", "unpack it"), ("x.pkl", "save it as .npy")],
)
def test_what_cannot_be_read_says_what_to_do(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    said = refused(tmp_path, tmp_path / name)
    assert advice in said
    assert "--kind" in said


def test_images_and_a_table_of_another_name(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "labels.csv").write_text("file,label\na.png,1\n")
    said = refused(tmp_path, tmp_path / "in")
    assert "1 images (a.png) and 1 CSV files (labels.csv)" in said
    assert "metadata.csv (or .jsonl, .parquet) and has a column file_name" in said
    done, _ = run(tmp_path, tmp_path / "in", kind="images")
    assert done.summary.ignored == ("labels.csv (not images)",)


CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: files/first.csv
  - split: test
    path: ["files/second.csv"]
- config_name: large
  {default}data_files: "files/*.csv"
---
# A card
"""


def test_the_card_of_a_repository_says_which_files_are_which_split(tmp_path: Path) -> None:
    root = tmp_path / "in"
    (root / "files").mkdir(parents=True)
    for number, name in enumerate(("first", "second", "third")):
        (root / "files" / f"{name}.csv").write_text(f"x\n{number}\n")
    (root / "README.md").write_text(CARD.format(default=""))
    assert "has the configurations small, large; name one" in refused(tmp_path, root)
    assert "no configuration 'huge'; it has small, large" in refused(tmp_path, root, config="huge")
    done, back = run(tmp_path, root, config="small")
    assert back["x"].tolist() == [0]
    assert "(configuration small, of which large are left out; --config" in told(done, "README.md")
    assert "files/third.csv (of no split in README.md)" in done.summary.ignored
    _, back = run(tmp_path, root, config="small", split="test")
    assert back["x"].tolist() == [1]
    (root / "README.md").write_text(CARD.format(default="default: true\n  "))
    done, back = run(tmp_path, root)
    assert back["x"].tolist() == [0, 1, 2]
    (root / "README.md").write_text("---\nconfigs: [\n---\n")
    assert "README.md: its header cannot be read" in refused(tmp_path, root)
    (root / "README.md").write_text("---\nlicense: mit\n---\n")
    _, back = run(tmp_path, root)
    assert back["x"].tolist() == [0, 1, 2]
    assert "leave --config out" in refused(tmp_path, root, config="small")


def test_several_configurations_are_not_mixed(tmp_path: Path) -> None:
    for language in ("de", "en"):
        (tmp_path / "in" / language).mkdir(parents=True)
        pyarrow.parquet.write_table(
            pa.table({"x": [1, 2]}), tmp_path / "in" / language / "train-00000-of-00001.parquet"
        )
    assert "several configurations of the dataset (de, en)" in refused(tmp_path, tmp_path / "in")
    _, back = run(tmp_path, tmp_path / "in" / "de")
    assert back["x"].tolist() == [1, 2]


def test_directories_that_are_joined_are_told(tmp_path: Path) -> None:
    for year in ("2020", "2021"):
        (tmp_path / "in" / year).mkdir(parents=True)
        (tmp_path / "in" / year / "sales.csv").write_text(f"x\n{year}\n")
    done, back = run(tmp_path, tmp_path / "in")
    assert back["x"].tolist() == [2020, 2021]
    assert "the files of 2 directories are joined (2020, 2021)" in told(done, "joined")


def test_the_output_of_an_earlier_run_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"kind": "x"}\n{"kind": "y"}\n')
    options = PrepareOptions(sources=(tmp_path / "in",), output=tmp_path / "in" / "out", shuffle=False)
    first = prepare(options)
    again = prepare(replace(options, force=True))
    assert again.manifest_hash == first.manifest_hash


def test_a_directory_that_cannot_be_read_is_not_left_out_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "x.csv").write_text("x\n1\n")
    real = os.scandir

    def closed(path: Any) -> Any:
        # root reads everything; this is how the system answers anybody else
        if str(path).endswith("in/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert "in/b cannot be read: Permission denied" in refused(tmp_path, tmp_path / "in", kind="csv")


def test_a_repository_without_its_large_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    assert "train.csv is a pointer of Git LFS" in refused(tmp_path, tmp_path / "in")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.csv").write_text("x\n1\n")
    (tmp_path / "links" / "b.csv").symlink_to(tmp_path / "gone.csv")
    done, _ = run(tmp_path, tmp_path / "links")
    assert done.summary.ignored == ("b.csv (no file, or a link to nothing)",)


def test_links_as_the_cache_of_the_hub_has_them(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    np.save(tmp_path / "blobs" / "x.npy", np.arange(4))
    (tmp_path / "in" / "data").mkdir(parents=True)
    (tmp_path / "in" / "data" / "x.npy").symlink_to(tmp_path / "blobs" / "x.npy")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    _, back = run(tmp_path, tmp_path / "in")
    assert back["x"].tolist() == [0, 1, 2, 3]

"""Which directories and files are splits, and which is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.data.sources.running import refused, run, told

from hypha.data.sources.splits import choose, place
from hypha.errors import ConfigError

ROOT = Path("/data")


def placed(*names: str, by_words: bool = True) -> dict[str, str | None]:
    return {
        str(one.path.relative_to(ROOT)): one.split
        for one in place(ROOT, [ROOT / name for name in names], by_words)
    }


@pytest.mark.parametrize(
    "found",
    [
        {"train.csv": "train", "test.csv": "test"},
        {
            "data/train-00000-of-00002.parquet": "train",
            "data/dev-00000-of-00001.parquet": "validation",
        },
        {
            "data/other-00000-of-00001-ab12.parquet": "other",
            "train-00000-of-00001.parquet": "train",
        },
        {"en/train/0.csv": "train", "en/dev/0.csv": "validation", "de/train/0.csv": "train"},
        {"training/a/1.png": "train", "val2017/a/1.png": "validation", "test_images/b/2.png": "test"},
        {"cat/train/1.png": "train", "cat/test/1.png": "test", "dog/train/1.png": "train"},
        {"mnist_train.csv": "train", "mnist_test.csv": "test"},
        {"x_train.npy": "train", "y_train.npy": "train", "x_test.npy": "test"},
        {"train_images.npy": "train", "train_labels.npy": "train", "test_labels.npy": "test"},
        {"data.csv": "train", "test.csv": "test"},
        {"train/a.csv": "train", "test/a.csv": "test", "extra/a.csv": "extra"},
        # classes
        {"train/1.png": None, "car/1.png": None, "plane/1.png": None},
        {"test_tube/1.png": None, "flask/1.png": None},
        # words within names that are no splits
        {"sales.csv": None, "ab_test.csv": None},
        {"contest.csv": None, "detrain.csv": None},
    ],
)
def test_files_are_placed_by_names(found: dict[str, str | None]) -> None:
    assert placed(*found) == found


def test_documents_are_of_a_split_only_when_called_exactly_so() -> None:
    names = {"how-to-test.txt": None, "the-last-train.txt": None}
    assert placed(*names, by_words=False) == names
    assert placed("train.txt", "valid.txt", by_words=False) == {
        "train.txt": "train",
        "valid.txt": "validation",
    }


def test_training_data_is_taken_and_that_is_told() -> None:
    assert choose(("train",), None, "x") == (("train",), None)
    assert choose(("test",), None, "x") == (("test",), None)
    splits, note = choose(("train", "validation", "test"), None, "x")
    assert splits == ("train",)
    assert note is not None
    assert "validation, test left out; --split takes another, --split all joins them" in note
    assert choose(("train", "validation", "test"), "val+test", "x") == (("validation", "test"), None)
    assert choose(("train", "test"), "all", "x")[0] == ("train", "test")
    with pytest.raises(ConfigError, match="x has the splits a, b; name one"):
        choose(("a", "b"), None, "x")
    with pytest.raises(ConfigError, match="there is no split 'c': x has the splits a, b"):
        choose(("a", "b"), "c", "x")
    with pytest.raises(ConfigError, match="has no splits; leave --split out"):
        choose((), "c", "x")


def test_the_test_table_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.csv").write_text("x\n1\n2\n")
    (tmp_path / "in" / "test.csv").write_text("x\n3\n")
    done, back = run(tmp_path, tmp_path / "in")
    assert back["x"].tolist() == [1, 2]
    assert "test left out" in told(done, "the split train is taken")
    assert done.summary.ignored == ("test.csv (of the split test)",)
    _, back = run(tmp_path, tmp_path / "in", split="test")
    assert back["x"].tolist() == [3]
    _, back = run(tmp_path, tmp_path / "in", split="all")
    assert sorted(back["x"].tolist()) == [1, 2, 3]
    assert "there is no split 'validation'" in refused(tmp_path, tmp_path / "in", split="validation")
    # files that somebody names are all meant
    _, back = run(tmp_path, tmp_path / "in" / "train.csv", tmp_path / "in" / "test.csv")
    assert back["x"].tolist() == [1, 2, 3]


def test_arrays_of_the_test_split_are_no_columns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, rows in (("x_train", 5), ("y_train", 5), ("x_test", 3), ("y_test", 3)):
        np.save(tmp_path / "in" / f"{name}.npy", np.arange(rows))
    _, back = run(tmp_path, tmp_path / "in", rename={"x_train": "x", "y_train": "y"})
    assert {name: len(values) for name, values in back.items()} == {"x": 5, "y": 5}
    (tmp_path / "plain").mkdir()
    for name in ("train_images", "labels"):
        np.save(tmp_path / "plain" / f"{name}.npy", np.arange(5))
    _, back = run(tmp_path, tmp_path / "plain")
    assert sorted(back) == ["labels", "train_images"]

"""Every kind of source, end to end: real files in, slices out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tests.data.reading import Array, read_dataset

from hypha.data import Prepared, PrepareOptions, prepare, verify
from hypha.data.sources import text
from hypha.data.sources.tables import csv_table, tables
from hypha.errors import ConfigError, DataError
from hypha.messages import Column


def run(tmp_path: Path, *sources: Path, **changes: Any) -> tuple[Prepared, dict[str, Array]]:
    changes = {"output": tmp_path / "out", "shuffle": False, "slice_samples": 7, **changes}
    done = prepare(PrepareOptions(sources=sources, **changes))
    assert verify(tmp_path / "out") == []
    return done, read_dataset(tmp_path / "out")


def refused(tmp_path: Path, *sources: Path, **changes: Any) -> str:
    options = PrepareOptions(sources=sources, output=tmp_path / "refused", **changes)
    with pytest.raises((DataError, ConfigError)) as caught:
        prepare(options)
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


# --- NumPy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_parts_are_read_one_after_the_other(tmp_path: Path, save: Any) -> None:
    for part in range(2):
        rows = np.arange(part * 10, part * 10 + 10)
        save(tmp_path / f"part{part}.npz", x=np.stack([rows, -rows], axis=1).astype(np.int16), y=rows / 4)
    done, back = run(tmp_path, tmp_path / "part0.npz", tmp_path / "part1.npz")
    assert done.manifest.columns == (
        Column(name="x", dtype="I16", shape=(2,)),
        Column(name="y", dtype="F32", shape=()),
    )
    assert back["x"][:, 1].tolist() == [-row for row in range(20)]
    assert back["y"].tolist() == [row / 4 for row in range(20)]


def test_column_major_arrays_and_a_directory_of_arrays(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    values = np.arange(60, dtype=np.float32).reshape(20, 3)
    np.save(tmp_path / "in" / "a.npy", np.asfortranarray(values))
    np.save(tmp_path / "in" / "b.npy", values.astype(">f8"))
    np.savez(tmp_path / "f.npz", a=np.asfortranarray(values))
    _, back = run(tmp_path, tmp_path / "in")
    assert np.array_equal(back["a"], values)
    assert np.array_equal(back["b"], values)
    _, back = run(tmp_path, tmp_path / "f.npz", force=True)
    assert np.array_equal(back["a"], values)


def test_numpy_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(5))
    np.save(tmp_path / "b.npy", np.zeros(6))
    assert "a has 5, b has 6" in refused(tmp_path, tmp_path / "a.npy", tmp_path / "b.npy")
    np.savez(tmp_path / "p.npz", x=np.zeros(5))
    np.savez(tmp_path / "q.npz", z=np.zeros(5))
    assert "q.npz has the arrays z" in refused(tmp_path, tmp_path / "p.npz", tmp_path / "q.npz")
    assert "cannot be mixed" in refused(tmp_path, tmp_path / "p.npz", tmp_path / "a.npy")
    np.save(tmp_path / "o.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    assert "o.npy holds object" in refused(tmp_path, tmp_path / "o.npy")
    np.save(tmp_path / "s.npy", np.float32(1))
    assert "the first axis is that of samples" in refused(tmp_path, tmp_path / "s.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    assert "cut.npy, row 1: cannot be read" in refused(tmp_path, tmp_path / "cut.npy")
    (tmp_path / "junk.npy").write_bytes(b"PK")
    assert "junk.npy is no .npy file" in refused(tmp_path, tmp_path / "junk.npy")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    assert "junk.npz is no .npz file" in refused(tmp_path, tmp_path / "junk.npz")


# --- CSV --------------------------------------------------------------------------------------------


def test_csv_with_features_and_text_labels(tmp_path: Path) -> None:
    lines = ["p0,p1,p2,p3,kind,weight"]
    lines += [f"{i},{i + 1}, {i + 2},{i + 3},{'odd' if i % 2 else 'even'},{i / 2}" for i in range(30)]
    (tmp_path / "in.csv").write_text("\n".join(lines))
    done, back = run(
        tmp_path,
        tmp_path / "in.csv",
        features={"pixel_values": ("p*",)},
        shapes={"pixel_values": (1, 2, 2)},
        scales={"pixel_values": 0.5},
        rename={"kind": "labels"},
    )
    assert done.manifest.columns == (
        Column(name="labels", dtype="I64", shape=()),
        Column(name="pixel_values", dtype="F32", shape=(1, 2, 2)),
        Column(name="weight", dtype="F32", shape=()),
    )
    assert back["pixel_values"][3].tolist() == [[[1.5, 2.0], [2.5, 3.0]]]
    assert back["labels"].tolist() == [i % 2 for i in range(30)]
    assert msgspec.json.decode((tmp_path / "out" / "labels.json").read_bytes()) == {
        "labels": {"even": 0, "odd": 1}
    }
    assert "became ids" in done.notes[0]


def test_csv_types_are_those_of_all_blocks_not_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_table, "BLOCK_CHARACTERS", 64)
    rows = [f"{i},{i},{'a' if i < 90 else 'b'}" for i in range(100)]
    rows[95] = "95.5,95,b"
    (tmp_path / "in.csv").write_text("x,y,z\n" + "\n".join(rows) + "\n")
    done, back = run(tmp_path, tmp_path / "in.csv", slice_samples=50)
    assert [column.dtype for column in done.manifest.columns] == ["F32", "I64", "I64"]
    assert back["x"][95] == 95.5
    assert back["z"].tolist() == [0] * 90 + [1] * 10


def test_several_files_tabs_and_no_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("1\t2\n3\t4\n")
    (tmp_path / "b.tsv").write_text("5\t6\n")
    _, back = run(tmp_path, tmp_path / "a.tsv", tmp_path / "b.tsv", csv_header=False)
    assert back["f0"].tolist() == [1, 3, 5]
    assert back["f1"].tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x,y\n1,2\n,3\n", r"in.csv, row 2 \(line 3\): column 'x' has no value"),
        ("x,y\n1,2\n3\n", "in.csv, line 3: it has 1 fields, the first line 2"),
        ("x\n1\n2\n3x\n4\n", r"column 'x' holds numbers, but .*in.csv, row 3 \(line 4\) holds '3x'"),
        ("x\n1\nnan\n", r"in.csv, row 2 \(line 3\): column 'x' has no value"),
        ("x\n1\n1e999\n", r"in.csv, row 2 \(line 3\): inf in column 'x' is NaN or infinite"),
        ("1,2\n3,4\n", "its first line holds numbers"),
        ("x,x\n3,4\n", "two columns are called 'x'"),
        ("", "in.csv"),
        ("x,y\n", "no samples"),
    ],
)
def test_csv_faults_are_told_with_file_row_and_column(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        run(tmp_path, tmp_path / "in.csv")


def test_csv_files_with_other_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("y\n1\n")
    assert "b.csv has other columns (y)" in refused(tmp_path, tmp_path / "a.csv", tmp_path / "b.csv")


def test_text_is_not_used_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x,name\n1,anna\n2,bert\n")
    assert "'name' is text" in refused(tmp_path, tmp_path / "in.csv", dtypes={"name": "F32"})
    assert "'name' is text" in refused(tmp_path, tmp_path / "in.csv", features={"f": ("x", "name")})
    assert "'name' is text" in refused(tmp_path, tmp_path / "in.csv", features={"f": ("*",)})
    _, back = run(tmp_path, tmp_path / "in.csv", dtypes={"name": "I32"})
    assert back["name"].dtype == np.int32


def test_too_many_different_texts_are_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LABELS", 5)
    (tmp_path / "in.csv").write_text("x,name\n" + "\n".join(f"{i},name{i}" for i in range(6)))
    assert "too many for labels" in refused(tmp_path, tmp_path / "in.csv")
    _, back = run(tmp_path, tmp_path / "in.csv", columns=("x",))
    assert list(back) == ["x"]


# --- Parquet ----------------------------------------------------------------------------------------


def test_parquet_with_lists_and_dictionaries(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for part in range(2):
        rows = range(part * 10, part * 10 + 10)
        table = pa.table(
            {
                "vector": pa.array([[i, i + 0.5, -i] for i in rows], pa.list_(pa.float32())),
                "matrix": pa.array([[[i, 1], [2, 3]] for i in rows], pa.list_(pa.list_(pa.int32(), 2), 2)),
                "kind": pa.array([f"k{i % 3}" for i in rows]).dictionary_encode(),
                "flag": pa.array([i % 2 == 0 for i in rows]),
                "price": pa.array(list(rows), pa.decimal128(10, 2)),
            }
        )
        pyarrow.parquet.write_table(table, tmp_path / "in" / f"part-{part}.parquet", row_group_size=4)
    done, back = run(tmp_path, tmp_path / "in")
    assert {column.name: (column.dtype, column.shape) for column in done.manifest.columns} == {
        "vector": ("F32", (3,)),
        "matrix": ("I32", (2, 2)),
        "kind": ("I64", ()),
        "flag": ("BOOL", ()),
        "price": ("F32", ()),
    }
    assert back["vector"].tolist() == [[i, i + 0.5, -i] for i in range(20)]
    assert back["matrix"][:, 0, 0].tolist() == list(range(20))
    assert back["kind"].tolist() == [i % 3 for i in range(20)]
    assert back["flag"].tolist() == [i % 2 == 0 for i in range(20)]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([[1, 2], [3, 4], [5]]), "row 3: column 'x' has a list of 1 values"),
        (pa.array([[1, 2], None, [5, 6]]), "row 2: column 'x' has no value"),
        (pa.array([[1, 2], [3, None], [5, 6]]), "row 2: column 'x' has no value"),
        (pa.array([1, None, 3]), "row 2: column 'x' has no value"),
        (pa.array([[[1], [2]], [[3], [4, 5]]]), "row 2: column 'x' has a list of 2 values"),
        (pa.array([[], []], pa.list_(pa.int8())), "empty list"),
        (pa.array([1, 2], pa.timestamp("s")), "of type timestamp"),
        (pa.array([["a"], ["b"]]), "column 'x' is of type list"),
        (pa.array(["a", None]), "row 2: column 'x' has no value"),
    ],
)
def test_parquet_faults_are_told_with_file_row_and_column(tmp_path: Path, column: Any, said: str) -> None:
    pyarrow.parquet.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=said):
        run(tmp_path, tmp_path / "in.parquet")


def test_parquet_files_that_are_broken_or_differ_are_named(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pa.table({"x": [1.0]}), tmp_path / "b.parquet")
    assert "b.parquet has other columns (x double)" in refused(
        tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet"
    )
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-10])
    assert "c.parquet is no Parquet file" in refused(tmp_path, tmp_path / "c.parquet")


# --- Hugging Face -----------------------------------------------------------------------------------


def picture(shade: int, size: tuple[int, int] = (4, 6), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (shade, 0, 255 - shade)).save(buffer, kind)
    return buffer.getvalue()


def test_a_saved_dataset_with_class_labels_and_images(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "weights": datasets.Sequence(datasets.Value("float64"), length=2),
        }
    )
    rows = {
        "image": [{"bytes": picture(i * 10), "path": None} for i in range(20)],
        "label": [i % 2 for i in range(20)],
        "weights": [[i, i / 2] for i in range(20)],
    }
    train = datasets.Dataset.from_dict(rows, features=features)
    saved = datasets.DatasetDict({"train": train, "test": train.select(range(5))})
    saved.save_to_disk(str(tmp_path / "in"))
    assert "train, test" in refused(tmp_path, tmp_path / "in", split="valid")
    done, back = run(
        tmp_path, tmp_path / "in", split="train", rename={"image": "pixel_values", "label": "labels"}
    )
    assert done.labels == {"labels": ("cat", "dog")}
    assert back["pixel_values"].shape == (20, 3, 4, 6)
    assert np.allclose(back["pixel_values"][3, :, 0, 0], [30 / 255, 0, 225 / 255])
    assert back["labels"].tolist() == [i % 2 for i in range(20)]
    assert back["weights"][7].tolist() == [7, 3.5]


def test_a_selection_of_a_saved_dataset_keeps_its_order(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"x": list(range(30)), "kind": [f"{i % 4}!" for i in range(30)]})
    dataset.shuffle(seed=1).select(range(20)).save_to_disk(str(tmp_path / "in"))
    expected = datasets.load_from_disk(str(tmp_path / "in"))["x"]
    _, back = run(tmp_path, tmp_path / "in")
    assert back["x"].tolist() == list(expected)
    assert back["kind"].tolist() == [x % 4 for x in expected]


def test_a_directory_that_is_no_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "dataset_info.json").write_text("{}")
    assert "no dataset saved with save_to_disk" in refused(tmp_path, tmp_path / "in")


# --- images -----------------------------------------------------------------------------------------


def test_an_image_folder_with_classes(tmp_path: Path) -> None:
    for number, name in enumerate(["cat", "ant", "bee"]):
        (tmp_path / "in" / name / "deep").mkdir(parents=True)
        for shade in range(4):
            path = tmp_path / "in" / name / ("deep" if shade == 3 else "") / f"{shade}.png"
            path.write_bytes(picture(50 * number + shade, size=(8, 5 + shade)))
        (tmp_path / "in" / name / "notes.txt").write_text("not an image")
        (tmp_path / "in" / name / ".hidden.png").write_bytes(b"junk")
    assert "give --image-size" in refused(tmp_path, tmp_path / "in")
    done, back = run(tmp_path, tmp_path / "in", image_size=(6, 4), image_channels=1)
    assert done.manifest.columns == (
        Column(name="labels", dtype="I64", shape=()),
        Column(name="pixel_values", dtype="F32", shape=(1, 6, 4)),
    )
    assert back["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert done.labels == {"labels": ("ant", "bee", "cat")}
    assert done.summary.ignored == (
        "ant/.hidden.png, bee/.hidden.png, cat/.hidden.png (hidden)",
        "ant/notes.txt, bee/notes.txt, cat/notes.txt (not images)",
    )
    assert 0 <= back["pixel_values"].min() <= back["pixel_values"].max() <= 1


def test_flat_images_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(9):
        Image.new("RGB", (3, 2), (number, 100, 200)).save(tmp_path / "in" / f"{number}.bmp")
    done, back = run(tmp_path, tmp_path / "in", dtypes={"pixel_values": "U8"})
    assert [column.name for column in done.manifest.columns] == ["pixel_values"]
    assert back["pixel_values"].dtype == np.uint8
    assert back["pixel_values"][:, :, 1, 2].tolist() == [[number, 100, 200] for number in range(9)]
    assert done.labels is None


def test_image_faults_are_named(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "a.png").write_bytes(picture(1))
    (tmp_path / "in" / "cat" / "b.png").write_bytes(picture(1)[:-40])
    assert "b.png is no image that can be read" in refused(tmp_path, tmp_path / "in")
    (tmp_path / "in" / "cat" / "b.png").unlink()
    Image.fromarray(np.full((4, 6), 7, np.float32)).save(tmp_path / "in" / "cat" / "b.tif")
    assert "more than 16 bits" in refused(tmp_path, tmp_path / "in")
    (tmp_path / "in" / "cat" / "b.tif").unlink()
    (tmp_path / "in" / "dog").mkdir()
    assert "dog holds no images" in refused(tmp_path, tmp_path / "in")
    (tmp_path / "in" / "loose.png").write_bytes(picture(1))
    assert "loose.png is beside directories (cat)" in refused(tmp_path, tmp_path / "in")


# --- text -------------------------------------------------------------------------------------------


def word_tokenizer(directory: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory.mkdir()
    words = ["[UNK]", "<end>", *(f"w{number}" for number in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_text_by_bytes_in_contiguous_blocks(tmp_path: Path) -> None:
    written = "Die Würde des Menschen ist unantastbar.\n" * 20
    (tmp_path / "in.txt").write_text(written)
    done, back = run(tmp_path, tmp_path / "in.txt", tokenizer="bytes", sequence_length=16)
    assert done.manifest.columns == (
        Column(name="input_ids", dtype="I64", shape=(16,)),
        Column(name="labels", dtype="I64", shape=(16,)),
    )
    ids = back["input_ids"].reshape(-1)
    assert bytes(ids.tolist()) == written.encode()[: len(ids)]
    assert len(written.encode()) - len(ids) == len(written.encode()) % 16
    assert np.array_equal(back["labels"], back["input_ids"])
    assert f"{len(written.encode()) % 16} tokens" in done.notes[0]


def test_text_with_a_tokenizer_directory_and_ends_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 40)
    monkeypatch.setattr(text, "_READ_CHARACTERS", 16)
    directory = word_tokenizer(tmp_path / "tok")
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>", "special": true}}')
    (tmp_path / "in").mkdir()
    lines = [" ".join(f"w{(line + word) % 50}" for word in range(7)) for line in range(30)]
    (tmp_path / "in" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "in" / "b.txt").write_text("w1 w2 zzz")
    (tmp_path / "in" / "c.txt").write_text("")
    _, back = run(tmp_path, tmp_path / "in", tokenizer=str(directory), sequence_length=5)
    expected = [2 + (line + word) % 50 for line in range(30) for word in range(7)] + [1, 3, 4, 0, 1]
    assert back["input_ids"].reshape(-1).tolist() == expected[: len(expected) // 5 * 5]


def test_text_of_a_table(tmp_path: Path) -> None:
    directory = word_tokenizer(tmp_path / "tok")
    table = pa.table({"body": [f"w{i} w{i + 1}" for i in range(10)], "id": list(range(10))})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    file = str(directory / "tokenizer.json")
    _, back = run(tmp_path, tmp_path / "in.parquet", tokenizer=file, sequence_length=4, text_column="body")
    assert back["input_ids"].tolist() == [[2 + i, 3 + i, 3 + i, 4 + i] for i in range(0, 10, 2)]
    done, again = run(tmp_path, tmp_path / "in.parquet", tokenizer=file, sequence_length=4, force=True)
    assert np.array_equal(again["input_ids"], back["input_ids"])
    assert done.notes[:2] == (
        "the only column of text is 'body', which is taken; --text-column names another",
        "text of column 'body' is cut into sequences; the columns id are left out",
    )
    assert "no column 'title'" in refused(
        tmp_path, tmp_path / "in.parquet", tokenizer=file, text_column="title"
    )
    assert "'id' is not text" in refused(tmp_path, tmp_path / "in.parquet", tokenizer=file, text_column="id")


def test_text_faults_are_told(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("short")
    assert "fewer than one sequence of 1024" in refused(tmp_path, tmp_path / "in.txt", tokenizer="bytes")
    assert "text needs one" in refused(tmp_path, tmp_path / "in.txt")
    assert "does not exist" in refused(tmp_path, tmp_path / "in.txt", tokenizer=str(tmp_path / "none"))
    (tmp_path / "bad.json").write_text("{}")
    assert "is no tokenizer" in refused(tmp_path, tmp_path / "in.txt", tokenizer=str(tmp_path / "bad.json"))
    (tmp_path / "in.txt").write_bytes(b"abc \xff def")
    assert "in.txt is not UTF-8 text; byte 5 of line 1 is 0xff" in refused(
        tmp_path, tmp_path / "in.txt", tokenizer="bytes"
    )


# --- all --------------------------------------------------------------------------------------------


def test_what_cannot_be_told_apart_asks_for_the_kind(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data.xyz").write_text("?")
    assert "give one of huggingface, images" in refused(tmp_path, tmp_path / "in")
    (tmp_path / "in" / "a.csv").write_text("x\n1\n")
    (tmp_path / "in" / "b.txt").write_text("readme")
    assert "cannot tell" in refused(tmp_path, tmp_path / "in")
    _, back = run(tmp_path, tmp_path / "in", kind="csv")
    assert back["x"].tolist() == [1]
    assert "holds no files ending with .npy" in refused(tmp_path, tmp_path / "in", kind="numpy")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "in.txt").write_text("x")
    monkeypatch.delitem(sys.modules, "hypha.data.sources.text", raising=False)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'hypha-train[train]'" in refused(tmp_path, tmp_path / "in.txt", tokenizer="bytes")

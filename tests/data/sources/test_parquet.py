"""Parquet as the hub and data frames have it."""

from __future__ import annotations

import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tests.data.sources.running import refused, run, told


def png(shade: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_images_and_classes_with_the_features_of_the_hub(tmp_path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["no", "yes"]),
        score=datasets.Value("float16"),
    )
    rows = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(20)],
        "label": [i % 2 for i in range(20)],
        "score": [i / 4 for i in range(20)],
    }
    (tmp_path / "in" / "data").mkdir(parents=True)
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "in" / "data" / "train-00000-of-00001.parquet"))
    done, back = run(tmp_path, tmp_path / "in", dtypes={"image": "U8"})
    assert back["image"].shape == (20, 3, 4, 4)
    assert back["image"][:, 0, 0, 0].tolist() == list(range(20))
    assert done.labels == {"label": ("no", "yes")}
    assert done.summary.labels == {"label": (("no", 10), ("yes", 10))}
    assert back["score"].dtype == np.float16
    assert "--rename image=pixel_values --rename label=labels" in told(done, "columns keep their names")
    done, back = run(tmp_path, tmp_path / "in", rename={"image": "pixel_values", "label": "labels"})
    assert done.labels == {"labels": ("no", "yes")}
    assert "columns keep their names" not in str(done.notes)


@pytest.mark.parametrize("form", ["struct", "binary", "path"])
def test_images_without_any_features(tmp_path: Path, form: str) -> None:
    (tmp_path / "pictures").mkdir()
    for shade in range(6):
        (tmp_path / "pictures" / f"{shade}.png").write_bytes(png(shade))
    column = {
        "struct": pa.array([{"bytes": png(i), "path": None} for i in range(6)]),
        "binary": pa.array([png(i) for i in range(6)]),
        "path": pa.array(
            [{"bytes": None, "path": f"pictures/{i}.png"} for i in range(6)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
    }[form]
    file = write(tmp_path / "in.parquet", image=column)
    _, back = run(tmp_path, file, dtypes={"image": "U8"})
    assert back["image"][:, 0, 0, 0].tolist() == list(range(6))


def test_an_image_that_is_broken_is_named(tmp_path: Path) -> None:
    images = [{"bytes": png(i), "path": None} for i in range(9)]
    images[5] = {"bytes": b"junk", "path": None}
    file = write(tmp_path / "in.parquet", image=pa.array(images))
    assert "in.parquet, row 6, column 'image' is no image" in refused(tmp_path, file)
    images[5] = {"bytes": None, "path": None}
    file = write(tmp_path / "in.parquet", image=pa.array(images))
    assert "in.parquet, row 6: column 'image' has neither an image nor a path" in refused(tmp_path, file)


def test_sound_is_no_image(tmp_path: Path) -> None:
    features = {"audio": {"_type": "Audio"}, "y": {"_type": "Value", "dtype": "int64"}}
    schema = pa.schema(
        {"audio": pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "y": pa.int64()},
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.table({"audio": [{"bytes": b"RIFF", "path": None}] * 3, "y": [1, 2, 3]}, schema=schema)
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet")
    said = refused(tmp_path, tmp_path / "in.parquet")
    assert "column 'audio' is of type struct" in said
    _, back = run(tmp_path, tmp_path / "in.parquet", drop=("audio",))
    assert back["y"].tolist() == [1, 2, 3]


def test_columns_of_all_types(tmp_path: Path) -> None:
    file = write(
        tmp_path / "in.parquet",
        half=pa.array(np.arange(4, dtype=np.float16) / 2),
        halves=pa.array([[i, 0.5] for i in range(4)], pa.list_(pa.float32(), 2)),
        money=pa.array([Decimal(f"{i}.25") for i in range(4)], pa.decimal128(20, 2)),
        kind=pa.array(["b", "a", "b", "a"], pa.large_string()),
        sort=pa.array(["b", "a", "b", "a"]).dictionary_encode(),
        code=pa.array([7, 8, 7, 8]).dictionary_encode(),
        big=pa.array([1, 2, 3, 2**40], pa.uint64()),
        flag=pa.array([True, False, True, None]).fill_null(False),
        vector=pa.array([[1.0, 2.0]] * 4, pa.large_list(pa.float64())),
    )
    done, back = run(tmp_path, file)
    assert back["half"].dtype == np.float16
    assert back["half"].tolist() == [0, 0.5, 1, 1.5]
    assert back["halves"].shape == (4, 2)
    assert back["money"].tolist() == [0.25, 1.25, 2.25, 3.25]
    assert done.labels == {"kind": ("a", "b"), "sort": ("a", "b")}
    assert back["code"].tolist() == [7, 8, 7, 8]
    assert back["big"].tolist() == [1, 2, 3, 2**40]
    assert back["flag"].dtype == np.bool_
    assert back["vector"].tolist() == [[1, 2]] * 4


def test_all_columns_that_make_no_tensor_are_named_at_once(tmp_path: Path) -> None:
    import datetime

    file = write(
        tmp_path / "in.parquet",
        x=pa.array([1, 2]),
        day=pa.array([datetime.date(2026, 1, 1)] * 2),
        when=pa.array([0, 1], pa.timestamp("ms")),
        words=pa.array([["a"], ["b"]]),
        nothing=pa.nulls(2),
        blob=pa.array([b"\0\1", b"\2"]),
    )
    said = refused(tmp_path, file)
    for name, kind in (
        ("day", "date32"),
        ("when", "timestamp"),
        ("words", "list"),
        ("nothing", "null"),
        ("blob", "binary"),
    ):
        assert f"column {name!r} is of type {kind}" in said
    assert "--drop day --drop when --drop words --drop nothing --drop blob" in said
    _, back = run(tmp_path, file, drop=("day", "when", "words", "nothing", "blob"))
    assert back["x"].tolist() == [1, 2]
    assert "--drop: there is no column 'z'" in refused(tmp_path, file, drop=("z",))
    assert "no column is left" in refused(tmp_path, write(tmp_path / "one.parquet", x=[1]), drop=("x",))


def test_columns_that_may_be_null(tmp_path: Path) -> None:
    full = write(tmp_path / "full.parquet", x=pa.array([1, 2, 3], pa.int32()), y=pa.array(["a", "b", "a"]))
    _, back = run(tmp_path, full)
    assert back["x"].dtype == np.int32
    gaps = write(
        tmp_path / "gaps.parquet",
        x=pa.array([1, None, 3, 4, 5]),
        y=pa.array(["a", "b", None, "a", "c"]),
        z=pa.array([1.0, 2.0, 3.0, float("nan"), 5.0]),
    )
    assert "row 2: column 'x' has no value" in refused(tmp_path, gaps, drop=("y",))
    done, back = run(tmp_path, gaps, missing="drop")
    assert back["x"].tolist() == [1, 5]
    assert done.labels == {"y": ("a", "c")}
    note = told(done, "3 rows with missing values are left out")
    assert "gaps.parquet, row 2 has no x; " in note
    assert "gaps.parquet, row 4 has no z" in note
    _, back = run(tmp_path, gaps, fill={"x": "0", "y": "none", "z": "-1"})
    assert back["x"].tolist() == [1, 0, 3, 4, 5]
    assert back["z"].tolist() == [1, 2, 3, -1, 5]


def test_labels_without_a_name_are_told(tmp_path: Path) -> None:
    features = datasets.Features(x=datasets.Value("int64"), label=datasets.ClassLabel(names=["no", "yes"]))
    rows = {"x": [1, 2, 3], "label": [-1, 0, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "in.parquet"))
    done, _ = run(tmp_path, tmp_path / "in.parquet")
    assert "2 rows have a label without a name in column 'label' (-1)" in told(done, "without a name")
    assert done.summary.labels == {"label": (("no", 1), ("yes", 0), ("-1", 2))}


@pytest.mark.parametrize("names", [("kind",), ("fine_label", "coarse_label")])
def test_the_only_classes_are_advised_as_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    features = datasets.Features({name: datasets.ClassLabel(names=["no", "yes"]) for name in names})
    made = datasets.Dataset.from_dict({name: [0, 1] for name in names}, features=features)
    made.to_parquet(str(tmp_path / "in.parquet"))
    done, _ = run(tmp_path, tmp_path / "in.parquet")
    assert ("--rename kind=labels" in str(done.notes)) == (names == ("kind",))
    assert ("=labels" in str(done.notes)) == (names == ("kind",))


def test_the_index_of_a_data_frame_is_no_column(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", x=[1, 2], __index_level_0__=[7, 9])
    done, back = run(tmp_path, file)
    assert list(back) == ["x"]
    assert "--column __index_level_0__" in told(done, "pandas")
    _, back = run(tmp_path, file, columns=("x", "__index_level_0__"))
    assert back["__index_level_0__"].tolist() == [7, 9]


def test_lists_of_different_lengths(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", x=pa.array([[1.0, 2.0], [3.0]]))
    said = refused(tmp_path, file)
    assert "row 2: column 'x' has a list of 1 values" in said
    assert "--pad x=0" in said
    assert "--drop x" in said


def test_lists_may_be_padded(tmp_path: Path) -> None:
    rows = [list(range(i % 5)) for i in range(20)]
    file = write(
        tmp_path / "in.parquet",
        input_ids=pa.array(rows, pa.list_(pa.int32())),
        weights=pa.array([[0.5] * len(row) for row in rows], pa.large_list(pa.float32())),
    )
    done, back = run(tmp_path, file, pad={"input_ids": -100, "weights": 0.25})
    assert back["input_ids"].dtype == np.int32
    assert back["input_ids"].tolist() == [row + [-100] * (4 - len(row)) for row in rows]
    assert back["weights"][1].tolist() == [0.5, 0.25, 0.25, 0.25]
    assert "padded with -100 to 4 values" in told(done, "column 'input_ids'")
    assert "'input_ids' of whole numbers" in refused(tmp_path, file, pad={"input_ids": 0.5, "weights": 0})
    assert "--pad: there is no column 'z'" in refused(tmp_path, file, pad={"z": 0})
    assert "column 'x' has no lists" in refused(tmp_path, write(tmp_path / "x.parquet", x=[1]), pad={"x": 0})
    gaps = write(tmp_path / "gaps.parquet", x=pa.array([[], [1], [2, None]]))
    assert "row 3: column 'x' has no value" in refused(tmp_path, gaps, pad={"x": 0})


def test_files_whose_columns_differ_in_what_makes_no_difference(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", x=pa.array([1, 2], pa.int64()), y=pa.array(["a", "b"]))
    table = pa.table(
        {"y": pa.array(["b", "c"], pa.large_string()), "x": pa.array([3, 4], pa.int32())},
        schema=pa.schema([pa.field("y", pa.large_string(), nullable=False), pa.field("x", pa.int32())]),
    )
    pyarrow.parquet.write_table(table, tmp_path / "in" / "b.parquet")
    done, back = run(tmp_path, tmp_path / "in")
    assert back["x"].tolist() == [1, 2, 3, 4]
    assert done.labels == {"y": ("a", "b", "c")}


def test_large_whole_numbers_that_lose_digits_are_told(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", x=pa.array([1.0, 16_777_217.0]), y=pa.array([0.1, 0.2]))
    done, _ = run(tmp_path, file)
    assert "--dtype x=F64" in told(done, "lose digits")
    done, back = run(tmp_path, file, dtypes={"x": "F64"})
    assert back["x"].tolist() == [1, 16_777_217]
    assert "digits" not in str(done.notes)


def test_a_file_with_columns_and_no_rows(tmp_path: Path) -> None:
    assert "has no samples" in refused(tmp_path, write(tmp_path / "in.parquet", x=pa.array([], pa.int64())))


def test_memory_is_bounded_by_decoded_images_not_by_files(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", image=pa.array([png(i % 200, (256, 256)) for i in range(600)]))
    from hypha.data import PrepareOptions
    from hypha.data.sources.layout import find_layout
    from hypha.data.sources.opening import open_source

    options = PrepareOptions(sources=(file,), output=tmp_path / "out")
    sizes = [block.columns["image"].nbytes for block in open_source(find_layout(options), options).blocks()]
    assert max(sizes) <= 16 << 20
    assert sum(sizes) == 600 * 3 * 256 * 256 * 4

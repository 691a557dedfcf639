"""Directories of images as people have them."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from tests.data.sources.running import refused, run, told

from hypha.data import PrepareOptions
from hypha.data.sources.image_folders import DescribedImages
from hypha.data.sources.layout import Layout
from hypha.data.sources.splits import Placed


def pets(root: Path, *classes: str, images: int = 4) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (4, 4), (50 * number, index, 0)).save(root / name / f"{index}.png")
    return root


def test_documentation_and_leftovers_beside_classes(tmp_path: Path) -> None:
    root = pets(tmp_path / "in", "cat", "dog")
    for name in ("README.md", "LICENSE", ".DS_Store", "Thumbs.db", "cat/Thumbs.db", "cat/.nomedia"):
        (root / name).write_text("no image")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / "__MACOSX" / "cat" / "0.png").write_text("no image")
    (root / "requirements.txt").write_text("pillow")
    done, back = run(tmp_path, root)
    assert done.labels == {"labels": ("cat", "dog")}
    assert back["labels"].tolist() == [0] * 4 + [1] * 4
    assert "requirements.txt (not images)" in done.summary.ignored
    assert done.summary.labels == {"labels": (("cat", 4), ("dog", 4))}


@pytest.mark.parametrize(
    "where", ["{split}/{name}", "data/{split}/{name}", "{name}/{split}", "{split}/images/{name}"]
)
def test_splits_are_no_classes(tmp_path: Path, where: str) -> None:
    for split, count, classes in (("train", 3, "abc"), ("test", 2, "bc")):
        for name in classes:
            directory = tmp_path / "in" / where.format(split=split, name=name)
            directory.mkdir(parents=True)
            for index in range(count):
                Image.new("L", (4, 4), index).save(directory / f"{index}.png")
    done, back = run(tmp_path, tmp_path / "in")
    assert done.labels == {"labels": ("a", "b", "c")}
    assert back["labels"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert "--split" in told(done, "the split train is taken")
    # an id stands for the same class in every split
    done, back = run(tmp_path, tmp_path / "in", split="test")
    assert back["labels"].tolist() == [1] * 2 + [2] * 2
    assert done.labels == {"labels": ("a", "b", "c")}
    assert "without an image here, but in other splits: a" in told(done, "keep their ids")


def test_directories_of_classes_are_named_by_the_one_that_holds_them(tmp_path: Path) -> None:
    root = pets(tmp_path / "in", "cat", "dog")
    assert "images are prepared from one directory" in refused(tmp_path, root / "cat", root / "dog")


def test_a_directory_may_be_named_as_the_split(tmp_path: Path) -> None:
    root = pets(tmp_path / "in", "summer/cat", "summer/dog", "winter/ant", "winter/dog", images=2)
    done, back = run(tmp_path, root, split="winter")
    assert done.labels == {"labels": ("ant", "dog")}
    assert len(back["labels"]) == 4


def test_splits_without_classes(tmp_path: Path) -> None:
    pets(tmp_path / "in", "train", "val")
    done, back = run(tmp_path, tmp_path / "in")
    assert list(back) == ["pixel_values"]
    assert len(back["pixel_values"]) == 4
    assert done.labels is None


def test_a_class_called_like_a_split(tmp_path: Path) -> None:
    done, _ = run(tmp_path, pets(tmp_path / "in", "car", "plane", "train"))
    assert done.labels == {"labels": ("car", "plane", "train")}
    assert "is taken for a class" in told(done, "the directory train")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_images_with_a_table_about_them(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    names = [f"deep/{i}.png" if i % 2 else f"{i}.png" for i in range(10)]
    for index, name in enumerate(names):
        Image.new("RGB", (3, 2), (index, 0, 0)).save(root / name)
    rows = [{"file_name": name, "label": i % 3, "age": i / 2} for i, name in reversed(list(enumerate(names)))]
    write_table(root / f"metadata.{kind}", rows)
    done, back = run(tmp_path, root, dtypes={"pixel_values": "U8"})
    assert done.summary.kind == "images"
    assert back["pixel_values"].shape == (10, 3, 2, 3)
    assert back["pixel_values"][:, 0, 0, 0].tolist() == list(reversed(range(10)))
    assert back["label"].tolist() == [i % 3 for i in reversed(range(10))]
    assert back["age"].tolist() == [i / 2 for i in reversed(range(10))]
    assert "--rename label=labels" in told(done, "columns keep their names")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".csv":
        lines = [f"{row['file_name']};{row['label']};{row['age']:.1f}".replace(".0", ",0") for row in rows]
        path.write_text("\n".join(["file_name;label;age", *(line.replace(".5", ",5") for line in lines)]))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def test_a_table_in_each_split(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("test", 3)):
        root = tmp_path / "in" / split
        (root / "pictures").mkdir(parents=True)
        rows = ["file_name,kind"]
        for index in range(count):
            Image.new("RGB", (2, 2), (index, 0, 0)).save(root / "pictures" / f"{index}.jpg")
            rows.append(f"pictures/{index}.jpg,{split}-{index % 2}")
        (root / "metadata.csv").write_text("\n".join(rows))
    done, back = run(tmp_path, tmp_path / "in")
    assert done.labels == {"kind": ("train-0", "train-1")}
    assert len(back["kind"]) == 5
    done, back = run(tmp_path, tmp_path / "in", split="test")
    assert done.labels == {"kind": ("test-0", "test-1")}
    assert len(back["kind"]) == 3


def test_one_table_for_all_splits(tmp_path: Path) -> None:
    root = pets(tmp_path / "in", "train", "test")
    rows = ["file_name,y"] + [f"{split}/{i}.png,{i}" for split in ("test", "train") for i in range(4)]
    (root / "metadata.csv").write_text("\n".join(rows))
    _, back = run(tmp_path, root, dtypes={"pixel_values": "U8"})
    assert back["y"].tolist() == [0, 1, 2, 3]
    assert back["pixel_values"][:, 0, 0, 0].tolist() == [0] * 4


def test_images_and_rows_that_do_not_meet(tmp_path: Path) -> None:
    root = pets(tmp_path / "in", "a", "b")
    (root / "metadata.csv").write_text("file_name,y\na/0.png,1\na/1.png,2\na/9.png,3\n")
    said = refused(tmp_path, root)
    assert "metadata.csv, row 3 (line 4): there is no image" in said
    (root / "metadata.csv").write_text("file_name,y\na/0.png,1\na/1.png,2\n")
    done, back = run(tmp_path, root)
    assert back["y"].tolist() == [1, 2]
    assert "6 images are left out, as no row of metadata.csv names them" in told(done, "left out")
    assert "directories (a, b) are not taken for classes" in told(done, "not taken for classes")
    (root / "metadata.csv").write_text("image,y\na/0.png,1\n")
    assert "has no column 'file_name'" in refused(tmp_path, root)


def test_the_time_for_a_row_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    table = tmp_path / "metadata.csv"
    table.write_text("\n".join(["file_name,y", *(f"{number}.png,1" for number in range(500))]))

    def cpu_seconds(images: int) -> float:
        files = tuple(Placed(tmp_path / f"{number}.png", None, ()) for number in range(images))
        options = PrepareOptions(sources=(tmp_path,), output=tmp_path / "out")
        described = DescribedImages(Layout("images", files, metadata=(table,)), options)
        before = time.thread_time()
        assert sum(batch.rows for batch in described.batches(["pixel_values", "y"])) == 500
        return time.thread_time() - before

    cpu_seconds(500)  # imports and caches
    few, many = cpu_seconds(500), cpu_seconds(30_000)
    assert many < 5 * few


def test_names_of_images_may_look_like_numbers(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    for index in range(3):
        Image.new("RGB", (2, 2)).save(root / f"00{index}.png")
    (root / "metadata.csv").write_text("file_name,y\n" + "".join(f"00{i}.png,{i}\n" for i in range(3)))
    _, back = run(tmp_path, root)
    assert back["y"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_orientation_says(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(
        np.kron(np.array([[0, 80], [160, 240], [40, 200]], np.uint8), np.ones((8, 8), np.uint8))
    )
    # what a camera stores, so that the orientation makes it upright again
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "in").mkdir()
    upright.save(tmp_path / "in" / "a.png")
    stored.save(tmp_path / "in" / "b.png", exif=exif)
    done, back = run(tmp_path, tmp_path / "in", dtypes={"pixel_values": "U8"}, image_channels=1)
    assert back["pixel_values"].shape == (2, 1, 24, 16)
    assert np.array_equal(back["pixel_values"][0], back["pixel_values"][1])
    assert any("EXIF" in note for note in done.notes) == (orientation > 1)


def test_images_of_all_modes_together(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.save(tmp_path / "in" / "a.png")
    red.convert("CMYK").save(tmp_path / "in" / "b.jpg", quality=100)
    red.convert("P").save(tmp_path / "in" / "c.png")
    red.convert("RGBA").save(tmp_path / "in" / "d.png")
    palette = red.convert("P")
    palette.save(tmp_path / "in" / "e.png", transparency=bytes([100] * 256))
    Image.new("L", (4, 4), 128).save(tmp_path / "in" / "f.png")
    Image.new("LA", (4, 4), (128, 9)).save(tmp_path / "in" / "g.png")
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "in" / "h.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "in" / "i.png")
    frames = [red.convert("P"), Image.new("RGB", (4, 4), (0, 255, 0)).convert("P")]
    frames[0].save(tmp_path / "in" / "j.gif", save_all=True, append_images=frames[1:])
    done, back = run(tmp_path, tmp_path / "in")
    pixels = back["pixel_values"][:, :, 1, 1]
    assert np.allclose(pixels[:5], [1, 0, 0], atol=0.02)
    assert np.allclose(pixels[5:8], 128 / 255, atol=0.003)
    assert np.allclose(pixels[8], 1)
    assert np.allclose(pixels[9], [1, 0, 0])
    assert "transparency of 3 images" in told(done, "--image-channels 4")
    assert "1 images have 16 bits" in told(done, "scaled to 0 to 1")
    assert "1 images have several frames" in told(done, "the first is taken")
    done, back = run(tmp_path, tmp_path / "in", dtypes={"pixel_values": "U8"}, image_channels=4)
    assert back["pixel_values"][7, :, 0, 0].tolist() == [128, 128, 128, 255]
    assert back["pixel_values"][6, :, 0, 0].tolist() == [128, 128, 128, 9]


def test_grey_images_in_three_channels_are_told(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(3):
        Image.new("L", (4, 4), index).save(tmp_path / "in" / f"{index}.png")
    done, _ = run(tmp_path, tmp_path / "in")
    assert "--image-channels 1" in told(done, "all images are grey")
    done, _ = run(tmp_path, tmp_path / "in", image_channels=1)
    assert "grey" not in str(done.notes)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_an_image_that_is_cut_is_named(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, kind)
    (tmp_path / "in").mkdir()
    for index in range(9):
        cut = len(buffer.getvalue()) // 2 if index == 7 else None
        (tmp_path / "in" / f"{index}.{kind.lower()}").write_bytes(buffer.getvalue()[:cut])
    assert f"7.{kind.lower()} is no image that can be read" in refused(tmp_path, tmp_path / "in")
    (tmp_path / "in" / f"7.{kind.lower()}").write_bytes(b"")
    assert f"7.{kind.lower()} is no image that can be read" in refused(tmp_path, tmp_path / "in")


def test_a_directory_that_has_lost_its_images(tmp_path: Path) -> None:
    root = pets(tmp_path / "in", "train/a", "train/b")
    (root / "train" / "c").mkdir()
    assert "c holds no images" in refused(tmp_path, root)

"""JSON lines, and lists of objects."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tests.data.sources.running import refused, run, told

from hypha.data.sources.tables import json_table

ROWS = [{"x": i, "y": i / 2, "kind": "ab"[i % 2], "v": [i, i + 1]} for i in range(30)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.jsonl", LINES.encode()),
        ("in.ndjson", b"\xef\xbb\xbf" + LINES.encode()),
        ("in.jsonl.gz", gzip.compress(LINES.encode())),
        ("in.json", json.dumps(ROWS, indent=1).encode()),
        ("in.json", b"\n\n" + LINES.replace("\n", "\r\n\r\n").encode()),
        ("in.jsonl", LINES.encode("utf-16")),
        ("in.jsonl", LINES.encode() + b'{"x": NaN}\n'),
    ],
)
def test_objects_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    monkeypatch.setattr(json_table, "BLOCK_CHARACTERS", 200)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    done, back = run(tmp_path, tmp_path / "in", missing="drop")
    assert done.summary.kind == "json"
    assert back["x"].tolist() == list(range(30))
    assert back["y"].tolist() == [i / 2 for i in range(30)]
    assert back["v"][3].tolist() == [3, 4]
    assert done.labels == {"kind": ("a", "b")}


def test_whole_numbers_that_become_fractions_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_table, "BLOCK_CHARACTERS", 20)
    (tmp_path / "in.jsonl").write_text('{"x": 1}\n{"x": 2}\n{"x": 2.5}\n{"x": null, "z": 1}\n{"x": 3}\n')
    _, back = run(tmp_path, tmp_path / "in.jsonl", missing="drop", drop=("z",))
    assert back["x"].tolist() == [1, 2, 2.5, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"x": 1}\n{"x": 2\n', "in.jsonl, line 2: it is no JSON"),
        ('{"x": 1}\n\n[2]\n', "in.jsonl, line 3: it is no object"),
        ('{"x": 1}\n{"x": "two"}\n', "in.jsonl, line 2: column 'x' holds \"two\", in.jsonl, line 1 1"),
        ('{"x": 1}\n\n{"y": 2}\n', "in.jsonl, line 3: column 'x' has no value"),
        ('{"x": {"a": 1}}\n', "column 'x' is of type struct"),
        ("", "holds no rows"),
        ("[1]", "element 1 is no object"),
    ],
)
def test_faults_are_told_with_file_line_and_column(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    assert said in refused(tmp_path, tmp_path / "in.jsonl").replace(f"{tmp_path}/", "")


def test_texts_in_json_lines(tmp_path: Path) -> None:
    rows = [{"text": f"text {i} ", "id": i} for i in range(20)] + [
        {"text": None, "id": 1},
        {"text": "", "id": 2},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, back = run(tmp_path, tmp_path / "in.jsonl", tokenizer="bytes", sequence_length=8)
    text = bytes(back["input_ids"].reshape(-1).tolist()).decode()
    assert text.startswith("text 0 text 1 text 2 ")
    assert "the columns id are left out" in told(done, "cut into sequences")
    assert "2 rows have no text" in told(done, "in.jsonl, line 21; ")

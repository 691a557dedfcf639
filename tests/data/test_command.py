"""`hypha-data prepare` as people run it: what is printed, and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypha.cli import data
from hypha.data import read_manifest


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["hypha-data", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        data.main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


def table(directory: Path) -> Path:
    directory.mkdir()
    rows = [f"{i};{i},5;{'no' if i % 3 else 'yes'}" for i in range(60)]
    (directory / "train.csv").write_text("id; x ;label\n" + "\n".join(rows) + "\n")
    (directory / "test.csv").write_text("id; x ;label\n1;1,5;yes\n")
    (directory / "README.md").write_text("about the table")
    return directory


SUMMARY = """\
note: the split train is taken, test left out; --split takes another, --split all joins them
note: train.csv: the delimiter is a semicolon (;), by its content; --delimiter gives another
note: columns x have decimal commas, by their values; --decimal . reads points only
note: column 'label' is text; its 2 different values became ids (see labels.json); --drop label leaves it out
note: columns keep their names; most models want --rename label=labels
kind: csv
rows: 60
column: id I64, such as 0
column: label I64, such as 1
column: x F32, such as 0.5
labels: label has 2: no (40), yes (20)
ignored: README.md (documentation)
ignored: test.csv (of the split test)
"""


def test_a_run_ends_with_a_summary_of_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in")
    arguments = ("prepare", source, "-o", tmp_path / "out", "--slice-samples", 10, "--holdout", 0.1)
    assert command(monkeypatch, *arguments, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert dry.startswith(SUMMARY)
    assert dry[len(SUMMARY) :] == (
        "dry run: out would have 54 samples in 6 slices, 6 held out; nothing is written\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert command(monkeypatch, *arguments) == 0
    wet = capsys.readouterr().out
    assert wet.startswith(SUMMARY)
    assert f"out: 54 samples in 6 slices, in {tmp_path / 'out'}\n" in wet
    assert f"out-holdout: 6 samples in 1 slices, in {tmp_path / 'out' / 'holdout'}\n" in wet


def test_a_dry_run_finds_what_a_real_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = table(tmp_path / "in")
    assert command(monkeypatch, "prepare", source, "-o", tmp_path / "out") == 0
    assert command(monkeypatch, "prepare", source, "-o", tmp_path / "out", "--dry-run") == 2
    assert "out exists already; name another directory, or replace it with --force" in capsys.readouterr().err
    (source / "train.csv").write_text("id;x\n1;2\n3;\n")
    assert command(monkeypatch, "prepare", source, "-o", tmp_path / "new", "--dry-run") == 2
    assert "train.csv, row 2 (line 3): column 'x' has no value" in capsys.readouterr().err
    assert (
        command(monkeypatch, "prepare", source, "-o", tmp_path / "new", "--dry-run", "--missing", "drop") == 0
    )
    assert "1 rows with missing values are left out" in capsys.readouterr().out


def test_flags_that_are_told_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("petal width;kind\n1,5;rose\n;iris\n")
    assert command(monkeypatch, "prepare", tmp_path / "in.csv", "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "(--fill 'petal width'=VALUE)" in told
    assert "(--drop 'petal width')" in told


def test_columns_may_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = table(tmp_path / "in")
    for number, words in enumerate(
        (["--columns", "x,label"], ["--column", "x", "--column", "label"], ["--drop", "id"])
    ):
        out = tmp_path / f"out{number}"
        assert command(monkeypatch, "prepare", source, "-o", out, *words, "--delimiter", "semicolon") == 0
        assert [column.name for column in read_manifest(out).columns] == ["label", "x"]


@pytest.mark.parametrize(
    "words",
    [
        ["--missing", "guess"],
        ["--decimal", "x"],
        ["--delimiter", "ab"],
        ["--encoding", "klingon"],
        ["--kind", "x"],
    ],
)
def test_what_an_option_may_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert command(monkeypatch, "prepare", table(tmp_path / "in"), "-o", tmp_path / "out", *words) == 2
    assert words[0].removeprefix("--") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

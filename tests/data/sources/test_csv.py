"""Tables as spreadsheets of all countries write them."""

from __future__ import annotations

import bz2
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from tests.data.sources.running import refused, run, told

from hypha.data.sources.tables import csv_table

NAMES = {";": "a semicolon", "\t": "a tab", "|": "a pipe"}


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_is_found_out_and_told(tmp_path: Path, delimiter: str) -> None:
    rows = [["x", "y", "kind"]] + [[f"{i}.5", f"{i}", "ab"[i % 2]] for i in range(20)]
    (tmp_path / "in.csv").write_text("\n".join(delimiter.join(row) for row in rows))
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == [i + 0.5 for i in range(20)]
    assert back["y"].tolist() == list(range(20))
    assert back["kind"].tolist() == [i % 2 for i in range(20)]
    assert NAMES[delimiter] in told(done, "--delimiter")
    done, again = run(tmp_path, tmp_path / "in.csv", delimiter=delimiter)
    assert again["x"].tolist() == back["x"].tolist()
    assert not any("--delimiter" in note for note in done.notes)


def test_a_comma_is_not_told_and_may_be_given_by_name(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x,y\n1,2\n3,4\n")
    done, _ = run(tmp_path, tmp_path / "in.csv", delimiter="comma")
    again, _ = run(tmp_path, tmp_path / "in.csv")
    assert done.notes == again.notes
    assert "--delimiter" not in str(done.notes)
    assert "one character, or one of tab" in refused(tmp_path, tmp_path / "in.csv", delimiter="ab")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-8"])
def test_decimal_commas_with_any_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    rows = ["länge;breite;art", *(f"{i},5;-{i},25;{i % 3}" for i in range(20))]
    content = "\r\n".join(rows) + "\r\n"
    data = content.encode(encoding)
    (tmp_path / "in.csv").write_bytes(data)
    asked = "utf-16-le" if encoding == "utf-16-le" else None
    done, back = run(tmp_path, tmp_path / "in.csv", encoding=asked)
    assert back["länge"].tolist() == [i + 0.5 for i in range(20)]
    assert back["breite"].tolist() == [-i - 0.25 for i in range(20)]
    assert back["art"].tolist() == [i % 3 for i in range(20)]
    assert "länge, breite have decimal commas" in told(done, "--decimal")


def test_a_file_in_another_encoding_is_named_with_line_and_what_to_do(tmp_path: Path) -> None:
    rows = ["x;name", *(f"{i};m" for i in range(30)), "5;Müller"]
    (tmp_path / "in.csv").write_bytes("\n".join(rows).encode("latin-1"))
    said = refused(tmp_path, tmp_path / "in.csv")
    assert "in.csv is not UTF-8 text; byte 4 of line 32 is 0xfc; give the encoding it has" in said
    assert "--encoding cp1252" in said
    done, _ = run(tmp_path, tmp_path / "in.csv", encoding="latin-1")
    assert done.labels == {"name": ("Müller", "m")}
    assert "there is no encoding 'klingon'" in refused(tmp_path, tmp_path / "in.csv", encoding="klingon")


def test_bytes_far_behind_the_beginning_are_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        "x;name",
        *(f"{i};some text to fill the first megabyte {i % 5}" for i in range(40_000)),
        "5;M\xfc",
    ]
    (tmp_path / "in.csv").write_bytes("\n".join(rows).encode("latin-1"))
    assert "in.csv is not UTF-8 text; byte 4 of line 40002 is 0xfc" in refused(tmp_path, tmp_path / "in.csv")


def test_utf_16_without_a_mark_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes("x,y\n1,2\n".encode("utf-16-le"))
    assert "--encoding utf-16-le" in refused(tmp_path, tmp_path / "in.csv")
    (tmp_path / "in.csv").write_bytes(b"x,y\n1,2\n3,\0\n")
    assert "it has zero bytes; it may be damaged" in refused(tmp_path, tmp_path / "in.csv")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1.234,5", 1234.5),
        ("1 234,5", 1234.5),
        ("1\u202f234,5", 1234.5),
        ("1\u00a0234\u00a0567,5", 1234567.5),
        ("1'234.5", 1234.5),
        ("1,234.5", 1234.5),
        ("1,234,567.5", 1234567.5),
        ("+12,5", 12.5),
        (",5", 0.5),
        ("1,5e3", 1500.0),
    ],
)
def test_thousands_and_decimal_signs(tmp_path: Path, written: str, value: float) -> None:
    (tmp_path / "in.csv").write_text(f"x;y\n{written};1\n{written};2\n", encoding="utf-8")
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == [value, value]
    grouped = len(re.split(r"[.,' \u202f\u00a0]", written)) > 2
    assert grouped == (f"{written} in column 'x' is read as {value}, by the column's values" in done.notes)


def test_whole_numbers_with_blanks_between_thousands(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x;y\n1 234;1\n12 345 678;2\n7;3\n")
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == [1234, 12345678, 7]
    assert back["x"].dtype == np.int64
    assert "1 234 in column 'x' is read as 1234" in told(done, "by the column's values")


def test_two_decimal_signs_in_one_column(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x;y\n1,5;1\n2,5;2\n3.25;3\n4,5;4\n")
    said = refused(tmp_path, tmp_path / "in.csv", decimal=",")
    assert "row 3 (line 4) holds '3.25', with another decimal sign than others" in said
    assert "with another decimal sign than others" in refused(tmp_path, tmp_path / "in.csv")


@pytest.mark.parametrize(
    ("rows", "expected", "words"),
    [
        # the other column shows that commas are decimal ones
        (["1.234;0,5", "2.500;1,5"], [1234, 2500], "1.234 in column 'x' is read as 1234; --decimal ."),
        (["1.234;0.5", "2.500;1.5"], [1.234, 2.5], "1.234 in column 'x' is read as 1.234; --decimal ,"),
        (["1.234;7", "2.500;8"], [1.234, 2.5], "1.234 in column 'x' is read as 1.234; --decimal ,"),
        (["1,234;7", "2,500;8"], [1.234, 2.5], "1,234 in column 'x' is read as 1.234; --decimal ."),
    ],
)
def test_what_can_be_read_both_ways_is_told(
    tmp_path: Path, rows: list[str], expected: list[float], words: str
) -> None:
    (tmp_path / "in.csv").write_text("x;y\n" + "\n".join(rows) + "\n")
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == pytest.approx(expected)
    assert words in told(done, "column 'x'")


def test_the_decimal_sign_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x;y\n1.234;7\n2.500;8\n")
    done, back = run(tmp_path, tmp_path / "in.csv", decimal=",")
    assert back["x"].tolist() == [1234, 2500]
    assert "--decimal" not in str(done.notes)
    (tmp_path / "in.csv").write_text('x,y\n"1,234",7\n"2,500",8\n')
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == [1234, 2500]
    assert "is read as 1234; --decimal ," in told(done, "column 'x'")


def test_quoted_fields_with_delimiters_and_line_ends(tmp_path: Path) -> None:
    rows = [f'{i};"first; line\nsecond ""{i % 2}"""' for i in range(12)]
    (tmp_path / "in.csv").write_text("x;text\n" + "\n".join(rows) + "\n12;\n")
    said = refused(tmp_path, tmp_path / "in.csv")
    assert "in.csv, row 13 (line 26): column 'text' has no value" in said
    assert "--missing drop" in said
    done, back = run(tmp_path, tmp_path / "in.csv", missing="drop")
    assert back["x"].tolist() == list(range(12))
    assert done.labels == {"text": ('first; line\nsecond "0"', 'first; line\nsecond "1"')}
    assert "1 rows with missing values are left out" in told(done, "row 13 (line 26) has no text")


def test_blanks_around_names_and_values(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(" x , sepal length \n1 , 2\n 3,4 \n")
    _, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == [1, 3]
    assert back["sepal length"].tolist() == [2, 4]
    (tmp_path / "in.csv").write_text("x, x\n1,2\n")
    assert "two columns are called 'x'" in refused(tmp_path, tmp_path / "in.csv")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_blanks_before_quotation_marks(tmp_path: Path, mark: str) -> None:
    rows = ['"city", "x y", n'] + [f'"Bath, Avon",  "{i} ""a""", {i}' for i in (0, 0, 1, 1)]
    (tmp_path / "in.csv").write_text(mark + "\n".join(rows), encoding="utf-8")
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert done.labels == {"city": ("Bath, Avon",), "x y": ('0 "a"', '1 "a"')}
    assert back["n"].tolist() == [0, 0, 1, 1]


def test_columns_without_names(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(",x,\n0,5,\n1,6,\n")
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert {name: values.tolist() for name, values in back.items()} == {"unnamed0": [0, 1], "x": [5, 6]}
    assert "--drop unnamed0" in told(done, "column 1 has no name")
    assert "it is left out" in told(done, "unnamed2")
    _, back = run(tmp_path, tmp_path / "in.csv", drop=("unnamed0",))
    assert list(back) == ["x"]


def test_the_first_line_of_excel_names_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("sep=;\nx;y\n1;2\n3;oops\n4;5\n5;6\n")
    said = refused(tmp_path, tmp_path / "in.csv")
    assert "row 2 (line 4) holds 'oops'" in said
    _, back = run(tmp_path, tmp_path / "in.csv", drop=("y",))
    assert back["x"].tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize(("suffix", "pack"), [(".csv.gz", gzip.compress), (".csv.bz2", bz2.compress)])
def test_compressed_tables(tmp_path: Path, suffix: str, pack: object) -> None:
    content = "x;y\n" + "".join(f"{i};{i},5\n" for i in range(50))
    data = gzip.compress(content.encode()) if suffix == ".csv.gz" else bz2.compress(content.encode())
    (tmp_path / f"in{suffix}").write_bytes(data)
    _, back = run(tmp_path, tmp_path / f"in{suffix}")
    assert back["y"].tolist() == [i + 0.5 for i in range(50)]
    (tmp_path / f"in{suffix}").write_bytes(data[: len(data) // 2])
    assert f"in{suffix}" in refused(tmp_path, tmp_path / f"in{suffix}")


def test_a_line_with_too_many_fields_is_told(tmp_path: Path) -> None:
    rows = [f'{i};"a\nb"' for i in range(20)]
    rows[10] = "10;x;y"
    (tmp_path / "in.csv").write_text("x;z\n" + "\n".join(rows) + "\n")
    said = refused(tmp_path, tmp_path / "in.csv")
    assert "in.csv, line 22: it has 3 fields, the first line 2 (x, z); the delimiter is a semicolon" in said


def test_a_quotation_mark_that_is_not_closed(tmp_path: Path) -> None:
    rows = [f'{i},"{"ab"[i % 2]}"' for i in range(20)]
    rows[12] = '12,"a'
    (tmp_path / "in.csv").write_text("x,y\n" + "\n".join(rows[:13] + [f"{i},b" for i in range(13, 20)]))
    said = refused(tmp_path, tmp_path / "in.csv")
    assert "in.csv, line 14: a quotation mark is opened here and not closed" in said
    # inches are no quotation
    (tmp_path / "in.csv").write_text('x,y\n1,5" pipe\n2,4 pipe\n')
    done, _ = run(tmp_path, tmp_path / "in.csv")
    assert done.labels == {"y": ("4 pipe", '5" pipe')}


def test_missing_values_are_refused_left_out_or_filled(tmp_path: Path) -> None:
    values = ["1.5", "NA", "", "nan", "2.5", "null", "3.5"]
    (tmp_path / "in.csv").write_text("x,y\n" + "".join(f"{value},{i}\n" for i, value in enumerate(values)))
    assert "row 2 (line 3): column 'x' has no value" in refused(tmp_path, tmp_path / "in.csv")
    done, back = run(tmp_path, tmp_path / "in.csv", missing="drop")
    assert back["x"].tolist() == [1.5, 2.5, 3.5]
    assert back["y"].tolist() == [0, 4, 6]
    assert "4 rows with missing values are left out" in told(done, "row 2 (line 3) has no x; ")
    _, back = run(tmp_path, tmp_path / "in.csv", fill={"x": "-1"})
    assert back["x"].tolist() == [1.5, -1, -1, -1, 2.5, -1, 3.5]
    assert "'many' is no value for column 'x'" in refused(tmp_path, tmp_path / "in.csv", fill={"x": "many"})
    assert "--fill: there is no column 'z'" in refused(tmp_path, tmp_path / "in.csv", fill={"z": "1"})


def test_what_is_wrong_with_a_column_that_nobody_wants_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x,y\n1,2\n2,oops\n3,4\n")
    assert "column 'y' holds numbers, but" in refused(tmp_path, tmp_path / "in.csv")
    for changes in ({"drop": ("y",)}, {"columns": ("x",)}):
        _, back = run(tmp_path, tmp_path / "in.csv", **changes)
        assert list(back) == ["x"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "in.csv is empty"),
        ("x,y\n", "has no"),
        ("\ufeff", "in.csv is empty"),
        ("x;y\n", "has no samples"),
    ],
)
def test_nothing_to_read_is_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "in.csv").write_text(content, encoding="utf-8")
    assert said in refused(tmp_path, tmp_path / "in.csv")


def test_one_column_is_told_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x\n1,5\n2,5\n")
    done, back = run(tmp_path, tmp_path / "in.csv")
    assert back["x"].tolist() == [1.5, 2.5]
    assert "it has one column" in told(done, "--delimiter")


def test_text_that_differs_row_by_row_is_not_taken_for_labels(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("x,name\n" + "".join(f"{i},name {i}\n" for i in range(60)))
    said = refused(tmp_path, tmp_path / "in.csv")
    assert "column 'name' holds text with 60 different values in 60 rows" in said
    assert "--tokenizer" in said
    assert "--drop name" in said
    done, _ = run(tmp_path, tmp_path / "in.csv", dtypes={"name": "I64"})
    assert done.labels is not None
    assert len(done.labels["name"]) == 60


def test_files_of_other_dialects_make_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("y;x\n4;3\n")
    _, back = run(tmp_path, tmp_path / "a.csv", tmp_path / "b.csv")
    assert back["x"].tolist() == [1, 3]
    assert back["y"].tolist() == [2, 4]


def test_a_row_longer_than_a_block_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_table, "BLOCK_CHARACTERS", 256)
    (tmp_path / "in.csv").write_text("x,y\n1,a\n2," + "b" * 1000 + "\n")
    assert "is a quotation mark missing" in refused(tmp_path, tmp_path / "in.csv")

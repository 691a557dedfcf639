from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypha.data.columns import Block, Shaper, cast, rows_from
from hypha.data.options import PrepareOptions
from hypha.errors import DataError
from hypha.messages import Column


def options(**changes: Any) -> PrepareOptions:
    return PrepareOptions(sources=(Path("in"),), output=Path("out"), **changes)


def block(**columns: Any) -> Block:
    return Block(rows_from("table.csv", 10), {name: np.asarray(values) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("numpy_dtype", "dtype"),
    [
        ("f8", "F32"),
        ("f4", "F32"),
        ("f2", "F16"),
        ("i8", "I64"),
        ("i4", "I32"),
        ("i2", "I16"),
        ("i1", "I8"),
        ("u1", "U8"),
        ("u2", "I64"),
        ("u8", "I64"),
        ("?", "BOOL"),
        (">f4", "F32"),
    ],
)
def test_dtypes_when_none_is_asked_for(numpy_dtype: str, dtype: str) -> None:
    shaper = Shaper(options())
    rows = shaper.records(block(x=np.array([0, 1, 1], dtype=numpy_dtype)))
    assert shaper.columns == (Column(name="x", dtype=dtype, shape=()),)
    assert rows["x"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("values", "dtype", "said"),
    [
        ([1.0, np.nan], "F32", "row 12: nan in column 'x' is NaN or infinite"),
        ([1.0, np.inf], "F64", "row 12: inf"),
        ([1e39, 1.0], "F32", "row 11: 1e.39 .* too large for F32"),
        ([1.0, 70000.0], "F16", "row 12: 70000.0 .* too large for F16"),
        ([3.4e38, 3.39e38], "BF16", "row 11: 3.4e.38 .* too large for BF16"),
        ([1.0, 1.5], "I64", "row 12: 1.5 .* no whole number"),
        ([1, 300], "U8", "row 12: 300 .* out of the range of U8"),
        ([1, -1], "U8", "row 12: -1 .* out of the range"),
        ([1.0, 2.0**63], "I64", "out of the range of I64"),
        ([1, 2], "BOOL", "row 12: 2 .* neither 0 nor 1"),
        (np.array([1, 2**63], dtype=np.uint64), "I64", "out of the range of I64"),
        (np.array(["a", "b"]), "F32", "no numbers"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_row(values: Any, dtype: str, said: str) -> None:
    with pytest.raises(DataError, match=f"table.csv.*{said}"):
        Shaper(options(dtypes={"x": dtype})).records(block(x=values))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([-(2**63), 2**63 - 1]), "I64"),
        (np.array([-(2.0**63), 2.0**62]), "I64"),
        (np.array([0, 255]), "U8"),
        (np.array([-128, 127]), "I8"),
        (np.array([65504.0, -65504.0]), "F16"),
        (np.array([True, False]), "I64"),
        (np.array([True, False]), "F32"),
        (np.array([0.0, 1.0]), "BOOL"),
    ],
)
def test_the_ends_of_a_range_fit(values: Any, dtype: str) -> None:
    made = cast(values, Column(name="x", dtype=dtype, shape=()), block(x=values))
    assert made.tolist() == values.tolist()


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5, 3.0e38, 0.0], dtype=np.float32)
    bits = cast(values, Column(name="x", dtype="BF16", shape=()), block(x=values))
    back = (bits.astype(np.uint32) << 16).view(np.float32)
    # 1 + 1/256 and 1 + 3/256 lie half-way; the even neighbours are 1 and 1 + 4/256
    assert back[:4].tolist() == [1.0, 1.0, 1.015625, -2.5]
    assert abs(back[4] - 3.0e38) / 3.0e38 < 2**-8
    assert back[5] == 0


def test_features_join_columns_in_the_source_order() -> None:
    shaper = Shaper(options(features={"pixels": ("p*",), "both": ("y", "p0")}, shapes={"pixels": (1, 1, 3)}))
    rows = shaper.records(block(y=[7, 8], p0=[1, 2], p1=[[3, 4], [5, 6]]))
    assert [column.name for column in shaper.columns] == ["both", "pixels"]
    assert rows["pixels"].tolist() == [[[[1, 3, 4]]], [[[2, 5, 6]]]]
    assert rows["both"].tolist() == [[7, 1], [8, 2]]


def test_columns_are_chosen_renamed_scaled_and_cast_by_their_new_names() -> None:
    shaper = Shaper(
        options(columns=("a", "b"), rename={"a": "x"}, scales={"x": 0.25}, dtypes={"b": "I32", "x": "F16"})
    )
    rows = shaper.records(block(a=[1, 2], b=[3, 4], c=[5, 6]))
    assert shaper.columns == (
        Column(name="b", dtype="I32", shape=()),
        Column(name="x", dtype="F16", shape=()),
    )
    assert rows["x"].tolist() == [0.25, 0.5]


def test_a_column_may_be_both_kept_and_part_of_a_feature() -> None:
    shaper = Shaper(options(columns=("a", "f"), features={"f": ("a", "b")}))
    rows = shaper.records(block(a=[1], b=[2], c=[3]))
    assert rows["a"].tolist() == [1]
    assert rows["f"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rename": {"q": "x"}}, "rename: there is no column 'q'"),
        ({"rename": {"a": "b"}}, "two columns would be called 'b'"),
        ({"dtypes": {"q": "F32"}}, "dtypes: there is no column 'q'; there are a, b"),
        ({"shapes": {"a": (2, 2)}}, r"1 values.*the shape \[2, 2\]"),
        ({"features": {"f": ("z*",)}}, r"no column is called 'z\*'"),
    ],
)
def test_options_that_do_not_fit_the_source_are_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Shaper(options(**changes)).records(block(a=[1], b=[2]))


def test_a_shape_that_changes_on_the_way_is_told() -> None:
    shaper = Shaper(options())
    shaper.records(block(x=[[1, 2]]))
    with pytest.raises(DataError, match=r"row 11: 'x' has the shape \[3\] from here on, before it had \[2\]"):
        shaper.records(block(x=[[1, 2, 3]]))

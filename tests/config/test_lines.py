"""Line numbers of TOML keys, against what a reader would count."""

from __future__ import annotations

import tomllib

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from hypha.config.reading.lines import key_lines

TEXT = '''\
# comment with [brackets] = "x"
a = 1
"quoted key" = 'it = [is]'
b.c = """
several = lines # no comment
"""  # b
d = [
  1,  # one
  { e = 2, f = "},]" },
  [ "x" ],
]

[t]
k = 2020-01-01T00:00:00Z
[[t.list]]
x = 1
[[t.list]]
x = 2
y = """a\\"""b"""
z = 3
[t.list.sub]
w = true
'''

EXPECTED = {
    ("a",): 2,
    ("quoted key",): 3,
    ("b",): 4,
    ("b", "c"): 4,
    ("d",): 7,
    ("d", 0): 8,
    ("d", 1): 9,
    ("d", 1, "e"): 9,
    ("d", 1, "f"): 9,
    ("d", 2): 10,
    ("d", 2, 0): 10,
    ("t",): 13,
    ("t", "k"): 14,
    ("t", "list"): 15,
    ("t", "list", 0): 15,
    ("t", "list", 0, "x"): 16,
    ("t", "list", 1): 17,
    ("t", "list", 1, "x"): 18,
    ("t", "list", 1, "y"): 19,
    ("t", "list", 1, "z"): 20,
    ("t", "list", 1, "sub"): 21,
    ("t", "list", 1, "sub", "w"): 22,
}


def test_every_key_of_a_text_with_all_forms() -> None:
    tomllib.loads(TEXT)
    assert key_lines(TEXT) == EXPECTED


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a = 1", "[a]", "a = 1\r\nb = 2\r\n"])
def test_small_texts(text: str) -> None:
    assert set(key_lines(text)) == {(key,) for key in tomllib.loads(text)}


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=5))
def test_every_path_of_any_document_has_a_line(document: dict[str, object]) -> None:
    text = tomli_w.dumps(document)
    lines = key_lines(text)

    def paths(value: object, at: tuple[str | int, ...]) -> set[tuple[str | int, ...]]:
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        found = {at} if at else set()
        for key, below in items:
            found |= paths(below, (*at, key))
        return found

    parsed = tomllib.loads(text)
    assert paths(parsed, ()) == set(lines)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())

"""Names: a class name exists once, and none of our own metaphors stands where the field has a word."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest
from tests.support.sources import FILES, SOURCE, parsed

#: Each has meant something here for which the field has a word.
FORBIDDEN = frozenset(
    ("books", "company", "crew", "desk", "facts", "lives", "meeting", "room", "spares", "workshop")
)


def parts_of(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def named_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Classes, functions and arguments, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def exported_classes(tree: ast.AST) -> Iterator[str]:
    return (
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )


def forbidden_in(source: str) -> list[str]:
    return [name for _, name in named_in(ast.parse(source)) if parts_of(name) & FORBIDDEN]


def test_a_class_name_exists_once() -> None:
    places = defaultdict(list)
    for path in FILES:
        for name in exported_classes(parsed(path)):
            places[name].append(str(path.relative_to(SOURCE)))
    assert len(places) > 700
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_names_are_those_of_the_field() -> None:
    for path in FILES:
        for part in path.relative_to(SOURCE).parts:
            assert not parts_of(part.removesuffix(".py")) & FORBIDDEN, f"{path}: the name of a module"
        for line, name in named_in(parsed(path)):
            assert not parts_of(name) & FORBIDDEN, f"{path}:{line}: {name}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("class CrewChanged: ...", ["CrewChanged"]),
        ("class HTTPDesk: ...", ["HTTPDesk"]),
        ("async def check_room(): ...", ["check_room"]),
        ("def told(peer, *, known_facts): ...", ["known_facts"]),
        ("class Mushroom:\n    def deskew(self, roommate): ...", []),
    ],
)
def test_a_metaphor_is_found_wherever_it_stands(source: str, found: list[str]) -> None:
    assert forbidden_in(source) == found


def test_a_class_that_exists_twice_is_found() -> None:
    assert list(exported_classes(ast.parse("class A: ...\nclass _B: ...\nclass A: ..."))) == ["A", "A"]

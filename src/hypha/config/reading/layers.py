"""Trees of settings and the models that they are for: layers, and what of a tree is valid.

When some keys are wrong there is no model instance; :class:`Settings` still gives every value that is right
by itself, so that checks between keys can run and all problems be told at once.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from datetime import date, time
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from hypha.config.reading.lines import KeyPath, key_lines
from hypha.config.section import PathOrUrl, Section
from hypha.errors import Problem

Value = str | int | float | bool | date | time | None | list["Value"] | dict[str, "Value"]


def field_named(model: type[Section], key: str) -> str | None:
    """The field that ``key`` means, in any spelling."""
    plain = key.replace("-", "_")
    if plain in model.model_fields:
        return plain
    return next((name for name, info in model.model_fields.items() if info.alias == key), None)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for part in get_args(annotation) if part is not type(None)]
    return [annotation]


def section_in(model: type[Section], name: str) -> tuple[type[Section] | None, bool]:
    """The Section a field holds, and whether it holds a list of them."""
    for part in _alternatives(model.model_fields[name].annotation):
        many = get_origin(part) is list
        inner = get_args(part)[0] if many else part
        if isinstance(inner, type) and issubclass(inner, Section):
            return inner, many
    return None, False


#: What pydantic adds to a location to say which member of a union it tried.
_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "none"})


def located(model: type[Section], loc: KeyPath) -> tuple[KeyPath, type[Section] | None]:
    """``loc`` in field names, cut where pydantic goes on to name alternatives of a union; and what table its
    last key is in, where that is a Section.
    """
    path: list[str | int] = []
    section: type[Section] | None = model
    table = section
    for key in loc:
        if isinstance(key, str):
            table = section
            if section is not None:
                key = field_named(section, key) or key
                section = section_in(section, key)[0] if key in section.model_fields else None
            elif "[" in key or key in _TYPE_NAMES:
                break
        path.append(key)
    return tuple(path), table


def is_text(model: type[Section] | None, key: str | int) -> bool:
    """Whether the field ``key`` is text or a path, so that ``10`` given for it is no number."""
    info = None if model is None else model.model_fields.get(str(key))
    return info is not None and all(part in (str, Path) for part in _alternatives(info.annotation))


def shown(loc: KeyPath) -> str:
    """``executors[0].class`` for people."""
    words = ""
    for key in loc:
        if isinstance(key, int):
            words += f"[{key}]"
        else:
            words += ("." if words else "") + _WRITTEN.get((words.split("[")[0], key), key)
    return words


#: how a field is written whose name in a file is a word of Python: by the table that it is in
_WRITTEN = {("executors", "kind"): "class", ("limits.schedule", "start"): "from"}


class Layer:
    """What one file, variable or flag (``source``) sets: ``raw`` as a ``tree`` in the field names of
    ``model``. Paths in it are relative to ``base`` (``None``: to the working directory); ``text`` is that of
    a file.
    """

    def __init__(
        self,
        model: type[Section],
        raw: Mapping[str, Value],
        source: str,
        text: str = "",
        base: Path | None = None,
    ) -> None:
        self.source = source
        self._model, self._text, self._base = model, text, base
        #: keys that are in it in two spellings
        self.twice: list[KeyPath] = []
        self.tree = self._table(model, raw, ())

    @cached_property
    def lines(self) -> dict[KeyPath, int]:
        """Of a file: on which line a key stands."""
        return {located(self._model, path)[0]: line for path, line in key_lines(self._text).items()}

    def _table(self, model: type[Section], raw: Mapping[str, Value], at: KeyPath) -> dict[str, Value]:
        tree: dict[str, Value] = {}
        for key, value in raw.items():
            name = field_named(model, key)
            if (name or key) in tree:
                self.twice.append((*at, name or key))
            tree[name or key] = value if name is None else self._field(model, name, value, (*at, name))
        return tree

    def _field(self, model: type[Section], name: str, value: Value, at: KeyPath) -> Value:
        info = model.model_fields[name]
        marks = [mark for mark in info.metadata if isinstance(mark, PathOrUrl)]
        place = Path in _alternatives(info.annotation) or (marks and value not in marks[0].words)
        if place and isinstance(value, str) and "://" not in value:
            expanded = Path(value).expanduser()
            return str(expanded if self._base is None else self._base / expanded)
        section, many = section_in(model, name)
        if section is None or not isinstance(value, dict | list):
            return value
        if not many:
            return self._table(section, value, at) if isinstance(value, dict) else value

        def entry(index: str | int, item: Value) -> Value:
            return self._table(section, item, (*at, index)) if isinstance(item, dict) else item

        if isinstance(value, list):
            return [entry(index, item) for index, item in enumerate(value)]
        # in variables and flags entry by entry: EXECUTORS__0__NAME
        return {index: entry(index, item) for index, item in value.items()}


class Settings:
    """The tree of all layers so far, where its keys were set, and what of it is valid."""

    def __init__(self, model: type[Section], source: str = "") -> None:
        self.model = model
        self.tree: dict[str, Value] = {}
        #: of the layers themselves
        self.problems: list[Problem] = []
        #: whose the value of a key is, and all that is in it
        self._origins: dict[KeyPath, Layer] = {(): Layer(model, {}, source)}

    def add(self, layer: Layer) -> None:
        """It wins key by key; lists are replaced whole unless it names entries."""
        self.tree = self._merged(self.tree, layer.tree, (), layer)
        self.problems += [self.problem(loc, "it is set twice, in two spellings") for loc in layer.twice]

    def _merged(self, below: Any, value: Value, here: KeyPath, layer: Layer) -> Any:
        if isinstance(value, dict) and isinstance(below, dict):
            return below | {
                key: self._merged(below.get(key), item, (*here, key), layer) for key, item in value.items()
            }
        numbered = isinstance(value, dict) and bool(value) and all(key.isdigit() for key in value)
        if isinstance(value, dict) and numbered and (below is None or isinstance(below, list)):
            items = list(below or ())
            for index, item in sorted((int(key), item) for key, item in value.items()):
                if index > len(items):
                    # a gap: leave the table as it is, validation names it
                    return value
                old = items[index] if index < len(items) else None
                items[index : index + 1] = [self._merged(old, item, (*here, index), layer)]
            return items
        self._origins = {path: one for path, one in self._origins.items() if path[: len(here)] != here}
        self._origins[here] = layer
        return value

    def problem(self, loc: KeyPath, message: str) -> Problem:
        """One with the key at ``loc``, told where that, or what it is in, was set."""
        around = [loc[:length] for length in range(len(loc), -1, -1)]
        layer = next(self._origins[path] for path in around if path in self._origins)
        line = next((layer.lines[path] for path in around if path in layer.lines), None)
        return Problem(key=shown(loc), source=layer.source, line=line, message=message)

    def get(self, *path: str) -> Any:
        """The valid value or default at ``path``; ``None`` where it is wrong, missing or ``None``."""
        section: type[Section] = self.model
        tree: Any = self.tree
        for position, name in enumerate(path):
            info = section.model_fields.get(name)
            if info is None or not isinstance(tree, Mapping):
                return None
            if name not in tree:
                value = info.get_default(call_default_factory=True)
                for rest in path[position + 1 :]:
                    value = getattr(value, rest, None)
                return None if value is PydanticUndefined else value
            inner, many = section_in(section, name)
            if position == len(path) - 1:
                annotation: Any = info.annotation
                for mark in info.metadata:
                    annotation = Annotated[annotation, mark]
                try:
                    return TypeAdapter(annotation).validate_python(tree[name])
                except ValidationError:
                    return None
            if inner is None or many:
                return None
            section, tree = inner, tree[name]
        return None

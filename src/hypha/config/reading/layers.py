"""Trees of settings and the models that they are for: layers, and what of a tree is valid.

A layer is a tree in the models' own key names, with where each key came from. When some keys are wrong there
is no model instance; :class:`Partial` still gives every value that is right by itself, so that checks between
keys can run and all problems be told at once.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from hypha.config.reading.lines import KeyPath
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


def place_words(model: type[Section], name: str) -> tuple[str, ...] | None:
    """``None`` when the field is no path, else the words that are none although it is one."""
    info = model.model_fields[name]
    if Path in _alternatives(info.annotation):
        return ()
    return next((mark.words for mark in info.metadata if isinstance(mark, PathOrUrl)), None)


def canonical_path(model: type[Section], loc: KeyPath) -> KeyPath:
    """``loc`` in field names, cut where pydantic goes on to name alternatives of a union."""
    path: list[str | int] = []
    section: type[Section] | None = model
    for key in loc:
        if isinstance(key, str) and section is not None:
            name = field_named(section, key)
            section = section_in(section, name)[0] if name else None
            key = name or key
        elif isinstance(key, str) and ("[" in key or key in _TYPE_NAMES):
            break
        path.append(key)
    return tuple(path)


#: What pydantic adds to a location to say which member of a union it tried.
_TYPE_NAMES = frozenset({"str", "int", "float", "bool", "none"})


def _section_at(model: type[Section], loc: KeyPath) -> type[Section] | None:
    section: type[Section] | None = model
    for key in loc:
        if section is not None and isinstance(key, str):
            section = section_in(section, key)[0] if key in section.model_fields else None
    return section


def fields_at(model: type[Section], loc: KeyPath) -> list[str]:
    """Names of the fields of the table at ``loc``."""
    section = _section_at(model, loc)
    return list(section.model_fields) if section is not None else []


def is_text(model: type[Section], loc: KeyPath) -> bool:
    """Whether the field at ``loc`` is text or a path, so that ``10`` given for it is no number."""
    section = _section_at(model, loc[:-1])
    if section is None or loc[-1] not in section.model_fields:
        return False
    annotation = section.model_fields[str(loc[-1])].annotation
    return all(part in (str, Path) for part in _alternatives(annotation))


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


@dataclass(frozen=True)
class Origin:
    """A file with the line, a variable, or a flag."""

    source: str
    line: int | None = None


@dataclass
class Layer:
    """Canonical ``tree``; ``origins`` of each path in it."""

    tree: dict[str, Value] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, loc: KeyPath, message: str) -> Problem:
        """One with the key at ``loc``, told where that, or what it is in, was set."""
        origins = (self.origins.get(loc[:length]) for length in range(len(loc), -1, -1))
        origin = next((one for one in origins if one is not None), Origin(""))
        return Problem(key=shown(loc), source=origin.source, line=origin.line, message=message)


def fold(
    model: type[Section],
    raw: Mapping[str, Value],
    origin_of: Callable[[KeyPath], Origin],
    base: Path | None,
) -> Layer:
    """``raw`` with hyphens and aliases turned into field names and paths made absolute against
    ``base`` (``None``: left to the working directory).
    """
    folding = _Folding(origin_of, base)
    folding.layer.tree = folding.table(model, raw, (), ())
    return folding.layer


@dataclass
class _Folding:
    origin_of: Callable[[KeyPath], Origin]
    base: Path | None
    layer: Layer = field(default_factory=Layer)

    def table(
        self, model: type[Section], raw: Mapping[str, Value], at: KeyPath, written: KeyPath
    ) -> dict[str, Value]:
        tree: dict[str, Value] = {}
        for key, value in raw.items():
            name = field_named(model, key)
            here, there = (*at, name or key), (*written, key)
            self.layer.origins[here] = self.origin_of(there)
            if here[-1] in tree:
                self.layer.problems.append(self.layer.problem(here, "it is set twice, in two spellings"))
            if name is None:
                tree[key] = value
                continue
            section, many = section_in(model, name)
            words = place_words(model, name)
            if isinstance(value, str) and words is not None and value not in words:
                tree[name] = self.absolute(value)
            elif section is None:
                tree[name] = value
                self.note_below(value, here, there)
            elif many and isinstance(value, list):
                tree[name] = [
                    self.item(section, item, (*here, index), (*there, index))
                    for index, item in enumerate(value)
                ]
            elif many and isinstance(value, dict):
                # entry by entry, from variables or flags: EXECUTORS__0__NAME
                tree[name] = {
                    index: self.item(section, item, (*here, _number(index)), (*there, _number(index)))
                    for index, item in value.items()
                }
            elif isinstance(value, dict):
                tree[name] = self.table(section, value, here, there)
            elif isinstance(value, str) and section.shorthand is not None:
                tree[name] = {section.shorthand: value}
                self.layer.origins[(*here, section.shorthand)] = self.origin_of(there)
            else:
                tree[name] = value
        return tree

    def item(self, section: type[Section], value: Value, at: KeyPath, written: KeyPath) -> Value:
        self.layer.origins[at] = self.origin_of(written)
        return self.table(section, value, at, written) if isinstance(value, dict) else value

    def note_below(self, value: Value, at: KeyPath, written: KeyPath) -> None:
        pairs = (
            enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
        )
        for key, below in pairs:
            self.layer.origins[(*at, key)] = self.origin_of((*written, key))
            self.note_below(below, (*at, key), (*written, key))

    def absolute(self, value: str) -> str:
        if "://" in value:
            return value
        expanded = Path(value).expanduser()
        return str(expanded if self.base is None else self.base / expanded)


def _number(index: str) -> int | str:
    return int(index) if index.isdigit() else index


def merge(below: Layer, above: Layer) -> Layer:
    """``above`` wins key by key; lists are replaced whole unless ``above`` names entries."""
    origins = dict(below.origins)
    tree = _merge_tables(below.tree, above.tree, (), origins)
    return Layer(tree, {**origins, **above.origins})


def _merge_tables(
    below: Mapping[str, Value], above: Mapping[str, Value], at: KeyPath, origins: dict[KeyPath, Origin]
) -> dict[str, Value]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge_values(below.get(key), value, (*at, key), origins)
    return merged


def _merge_values(below: Value, value: Value, here: KeyPath, origins: dict[KeyPath, Origin]) -> Value:
    if isinstance(below, dict) and isinstance(value, dict):
        return _merge_tables(below, value, here, origins)
    numbered = isinstance(value, dict) and bool(value) and all(key.isdigit() for key in value)
    if numbered and isinstance(value, dict) and (below is None or isinstance(below, list)):
        items = list(below or [])
        for index, item in sorted((int(key), item) for key, item in value.items()):
            if index < len(items):
                items[index] = _merge_values(items[index], item, (*here, index), origins)
            elif index == len(items):
                items.append(item)
            else:
                # a gap: leave the table as it is, validation names it
                return value
        return items
    for path in [path for path in origins if path[: len(here)] == here]:
        del origins[path]
    return value


class Partial:
    """What of a tree is valid on its own."""

    def __init__(self, model: type[Section], tree: Mapping[str, Any]) -> None:
        self.model = model
        self._tree = tree

    def get(self, *path: str) -> Any:
        """The valid value or default at ``path``; ``None`` where it is wrong, missing or ``None``."""
        section: type[Section] = self.model
        tree: Any = self._tree
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

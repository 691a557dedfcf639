"""Looking at configuration models from outside: field names, sections, and values valid on their own.

When some keys are wrong there is no model instance; :class:`Partial` still gives every value that is
right by itself, so that checks between keys can run and all problems be told at once.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from hypha.config.reading.lines import KeyPath
from hypha.config.section import PathOrUrl, Section


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

"""One layer of configuration: a tree in the models' own key names, and where each key came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path

from hypha.config.reading.lines import KeyPath
from hypha.config.reading.partial import field_named, place_words, section_in, shown
from hypha.config.section import Section
from hypha.errors import Problem

Value = str | int | float | bool | date | time | None | list["Value"] | dict[str, "Value"]


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

"""Writing a configuration file with every key, its default and what it means, from the models themselves.

What is given is written as it is, a default as a commented line, so that a newer release's better default
counts. What cannot be known is written as a placeholder under a line that says FILL IN.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hypha.config.reading.layers import Value, section_in
from hypha.config.section import Section

FILL_IN = "FILL IN"


def write_template(model: type[Section], given: Mapping[str, Value], fill_in: Mapping[str, str]) -> str:
    """TOML text. ``given`` holds values by dotted key, ``fill_in`` for some of them (or for keys of
    ``given`` that are placeholders) what the operator has to write there.
    """
    lines = [f"# {line}" for line in _summary(model)]
    lines += _Template(given, fill_in).table(model, "", active=True)
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class _Template:
    given: Mapping[str, Value]
    fill_in: Mapping[str, str]

    def table(self, model: type[Section], at: str, active: bool) -> list[str]:
        """``at`` ends with a dot, unless it is the top level."""
        lines: list[str] = []
        tables: list[str] = []
        for name, info in model.model_fields.items():
            here = at + name
            section, many = section_in(model, name)
            if section is None:
                lines += self.key(here, info, active)
                continue
            listed = self.given.get(here) if many else None
            below = any(key.startswith(f"{here}.") for key in self.given)
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            optional = many or (default is None and not info.is_required())
            wanted = active and (bool(listed) or below or not optional)
            head = f"[[{here}]]" if many else f"[{here}]"
            tables += ["", *(f"# {line}" for line in (notes_of(info) or _summary(section)))]
            entries: list[Any] = [None]
            if isinstance(listed, list) and listed:
                entries = [one for one in listed if isinstance(one, dict)]
            elif many and default and not wanted:
                entries = _plain(default)
            for entry in entries:
                tables.append(head if wanted else f"#{head}")
                values = self.given
                if entry is not None:
                    values = {f"{here}.{key}": value for key, value in entry.items() if value is not None}
                tables += _Template(values, self.fill_in).table(section, f"{here}.", wanted)
        return [*lines, *tables]

    def key(self, dotted: str, info: FieldInfo, active: bool) -> list[str]:
        name = info.alias if info.alias and "-" not in info.alias else dotted.rpartition(".")[2]
        lines = [f"# {line}" for line in notes_of(info)]
        if dotted in self.fill_in:
            lines.append(f"# {FILL_IN}: {self.fill_in[dotted]}")
        if dotted in self.given:
            mark = "" if active else "#"
            return [*lines, *(mark + line for line in _toml(name, self.given[dotted]))]
        default = _plain(info.get_default(call_default_factory=True)) if not info.is_required() else None
        if default is None:
            return [*lines, f"#{name} ="]
        return [*lines, *("#" + line for line in _toml(name, default))]


def _toml(name: str, value: Value) -> list[str]:
    line = f"{name} = {_inline(value)}"
    if len(line) <= 100 or not isinstance(value, list):
        return [line]
    return [f"{name} = [", *(f"    {_inline(item)}," for item in value), "]"]


def _inline(value: Value) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{_quoted(key)} = {_inline(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_inline(item) for item in value)}]"
    return tomli_w.dumps({"v": value}).split("=", 1)[1].strip()


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else tomli_w.dumps({key: 0}).split(" =")[0]


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _summary(model: type[Section]) -> list[str]:
    return textwrap.wrap(_plainly(" ".join((model.__doc__ or "").split())), 100)


def _plainly(text: str) -> str:
    return text.replace("``None``", "not set").replace("``", "")


def notes_of(info: FieldInfo) -> list[str]:
    """What the docstring below a field says of it, line by line."""
    return _plainly((info.description or "").strip()).splitlines()

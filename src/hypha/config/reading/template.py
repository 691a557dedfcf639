"""Writing a configuration file with every key, its default and what it means, from the models themselves.

What is given is written as it is, a default as a commented line, so that a newer release's better default
counts. What cannot be known is written as a placeholder under a line that says FILL IN.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hypha.config.reading.layers import Value
from hypha.config.reading.partial import section_in
from hypha.config.section import Section

FILL_IN = "FILL IN"


def write_template(model: type[Section], given: Mapping[str, Value], fill_in: Mapping[str, str]) -> str:
    """TOML text. ``given`` holds values by dotted key, ``fill_in`` for some of them (or for keys of
    ``given`` that are placeholders) what the operator has to write there.
    """
    lines = [f"# {line}" for line in _summary(model)]
    lines += _table(model, (), given, fill_in, active=True)
    return "\n".join(lines).rstrip() + "\n"


def _table(
    model: type[Section],
    at: tuple[str, ...],
    given: Mapping[str, Value],
    fill_in: Mapping[str, str],
    active: bool,
) -> list[str]:
    lines: list[str] = []
    tables: list[str] = []
    for name, info in model.model_fields.items():
        section, many = section_in(model, name)
        if section is None:
            lines += _key((*at, name), info, given, fill_in, active)
            continue
        here = (*at, name)
        listed = given.get(".".join(here)) if many else None
        wanted = active and (bool(listed) or _is_given(here, given) or not (many or _optional(info)))
        head = f"[[{'.'.join(here)}]]" if many else f"[{'.'.join(here)}]"
        tables += ["", *(f"# {line}" for line in (notes_of(info) or _summary(section)))]
        entries: list[dict[str, Value] | None] = _entries(info) if many and not wanted else [None]
        if isinstance(listed, list) and listed:
            entries = [one for one in listed if isinstance(one, dict)]
        for entry in entries:
            tables.append(head if wanted else f"#{head}")
            values = dict(given)
            if entry is not None:
                values = {".".join((*here, key)): value for key, value in entry.items() if value is not None}
            below = _table(section, here, values, fill_in, wanted)
            tables += below
    return [*lines, *tables]


def _key(
    at: tuple[str, ...],
    info: FieldInfo,
    given: Mapping[str, Value],
    fill_in: Mapping[str, str],
    active: bool,
) -> list[str]:
    dotted = ".".join(at)
    name = info.alias if info.alias and "-" not in info.alias else at[-1]
    lines = [f"# {line}" for line in notes_of(info)]
    if dotted in fill_in:
        lines.append(f"# {FILL_IN}: {fill_in[dotted]}")
    if dotted in given:
        mark = "" if active else "#"
        return [*lines, *(mark + line for line in _toml(name, given[dotted]))]
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


def _entries(info: FieldInfo) -> list[dict[str, Value] | None]:
    default = info.get_default(call_default_factory=True)
    return [_plain(entry) for entry in default] if default else [None]


def _optional(info: FieldInfo) -> bool:
    return not info.is_required() and info.get_default(call_default_factory=True) is None


def _is_given(at: tuple[str, ...], given: Mapping[str, Value]) -> bool:
    prefix = ".".join(at) + "."
    return any(key.startswith(prefix) for key in given)


def _summary(model: type[Section]) -> list[str]:
    return textwrap.wrap(_plainly(" ".join((model.__doc__ or "").split())), 100)


def _plainly(text: str) -> str:
    return text.replace("``None``", "not set").replace("``", "")


def notes_of(info: FieldInfo) -> list[str]:
    """What the docstring below a field says of it, line by line."""
    return _plainly((info.description or "").strip()).splitlines()

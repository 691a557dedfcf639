"""Layering: TOML file, then ``HYPHA_*`` variables, then ``OTEL_*`` ones, then flags; the later wins, key by
key.

:func:`load_config` gives a checked configuration or one ConfigError with *every* problem, each with its
key path and the file and line, variable or flag it came from. Keys may be written ``a_b`` or ``a-b``.
``HYPHA_RESOURCES__MEMORY=16`` sets ``resources.memory``; values are TOML or JSON, else plain text.
Relative paths in a file are relative to that file.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from hypha.config.checks import cross_checks
from hypha.config.environment import process_environment
from hypha.config.models import COMPONENTS
from hypha.config.otel import otel_settings
from hypha.config.reading.layers import (
    Layer,
    Settings,
    Value,
    is_text,
    located,
    shown,
)
from hypha.config.reading.lines import KeyPath, syntax_problem
from hypha.config.section import Section
from hypha.errors import ConfigError, Problem

M = TypeVar("M", bound=Section)

#: A further check, made by a package that configuration may not import: it sees what is valid so far.
Check = Callable[[Settings], Iterable[Problem]]

#: Filters in the manner of RUST_LOG; the later named wins.
_LOG_VARIABLES = ("RUST_LOG", "HYPHA_LOG")


@dataclass(frozen=True)
class Flag:
    """One flag given on the command line: ``name`` as typed (``--listen``), the dotted ``key`` it sets."""

    name: str
    key: str
    value: Value


def load_config(
    model: type[M],
    path: Path | None = None,
    flags: Sequence[Flag] = (),
    environ: Mapping[str, str] | None = None,
    checks: Sequence[Check] = (),
) -> M:
    """Read, layer and check; raises ConfigError with all problems. ``environ``: the process's."""
    settings = Settings(model, str(path) if path is not None else "")
    if path is not None:
        try:
            text, raw = read_toml(path)
        except ConfigError as exc:
            settings.problems += exc.problems
        else:
            settings.add(Layer(model, raw, str(path), text, path.absolute().parent))
    _add_environment(settings, process_environment() if environ is None else environ)
    for flag in flags:
        settings.add(_single(model, flag.key.split("."), flag.value, flag.name))
    problems = settings.problems
    config: M | None = None
    try:
        config = model.model_validate(settings.tree)
    except ValidationError as exc:
        # without the file every required key would be "missing", which hides the one real problem
        if path is None or settings.tree or not problems:
            problems += _pydantic_problems(settings, exc)
    if settings.tree:
        problems += [settings.problem(loc, message) for loc, message in cross_checks(settings)]
    for found in (problem for check in checks for problem in check(settings)):
        # one in a file that a key names is told where that key stands
        message = f"{found.source}: {found.message}" if found.source else found.message
        problems.append(settings.problem(tuple(found.key.split(".")), message) if found.key else found)
    if problems or config is None:
        # by file and line, each once
        unique = dict.fromkeys(problems)
        raise ConfigError(sorted(unique, key=lambda problem: (problem.source, problem.line or 0)))
    return config


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a file, and what it holds. Raises ConfigError."""
    try:
        # with or without the mark that some editors put before UTF-8
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        wrong = "there is no such file; write one with `init`, or correct --config"
    except OSError as exc:
        wrong = f"it cannot be read: {exc.strerror}"
    except UnicodeDecodeError:
        wrong = "it is not UTF-8 text"
    else:
        try:
            return text, tomllib.loads(text)
        except tomllib.TOMLDecodeError as exc:
            raise ConfigError([syntax_problem(str(path), text, exc)]) from exc
    raise ConfigError([Problem("", wrong, str(path))])


def _add_environment(settings: Settings, environ: Mapping[str, str]) -> None:
    model = settings.model
    for name in _LOG_VARIABLES:
        if text := environ.get(name):
            settings.add(_single(model, ["log_level"], text, name))
    for name in sorted(environ):
        if not name.startswith("HYPHA_") or name in _LOG_VARIABLES:
            continue
        keys = name.removeprefix("HYPHA_").lower().split("__")
        if keys[0] in model.model_fields:
            settings.add(_single(model, keys, _parse_value(model, keys, environ[name]), name))
        elif not any(keys[0] in other.model_fields for other in COMPONENTS.values()):
            # one meant for another component on this machine is no mistake; this is
            known = [f"HYPHA_{field.upper()}" for field in model.model_fields]
            settings.problems.append(Problem("", _unknown(name, [*known, "HYPHA_LOG"]), name))
    for name, key, value in otel_settings(environ):
        settings.add(_single(model, [key], value, name))


def _single(model: type[Section], keys: Sequence[str], value: Value, source: str) -> Layer:
    *above, last = keys
    raw: dict[str, Value] = {last: value}
    for key in reversed(above):
        raw = {key: raw}
    return Layer(model, raw, source)


def parse_setting(model: type[Section], text: str) -> Flag:
    """``KEY=VALUE`` of ``--set``; ConfigError when there is no ``=``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError([Problem(key="", source=f"--set {text}", message="write KEY=VALUE")])
    key = key.strip()
    return Flag(f"--set {key}", key, _parse_value(model, key.split("."), value.strip()))


def _parse_value(model: type[Section], keys: Sequence[str], text: str) -> Value:
    """The value of a key as TOML, else JSON, else as it is; text stays text where text is wanted."""
    path, table = located(model, tuple(int(key) if key.isdigit() else key for key in keys))
    stripped = text.strip()
    if is_text(table, path[-1]) and stripped[:1] not in ('"', "'"):
        return text
    try:
        value: Any = tomllib.loads(f"value = {stripped}")["value"]
    except tomllib.TOMLDecodeError:
        try:
            value = json.loads(stripped)
        except ValueError:
            return text
    return value  # type: ignore[no-any-return]


def _pydantic_problems(settings: Settings, exc: ValidationError) -> list[Problem]:
    found: dict[KeyPath, list[str]] = {}
    for error in exc.errors(include_url=False):
        loc, table = located(settings.model, tuple(error["loc"]))
        if error["type"] == "extra_forbidden":
            message = _unknown_key(settings.model, table, loc)
        elif error["type"] == "missing":
            message = "it is required and not set"
        elif error["type"] == "path_type":
            message = f"it should be a path, not {error['input']!r}"
        else:
            message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            if message != error["msg"]:
                message = f"it should be {message}"
            given = error["input"]
            secret = any(word in shown(loc) for word in ("token", "headers"))
            if isinstance(given, str | int | float | bool) and not secret:
                message += f", not {given!r}"
        found.setdefault(loc, []).append(message)
    return [settings.problem(loc, " or ".join(dict.fromkeys(messages))) for loc, messages in found.items()]


def _unknown_key(model: type[Section], table: type[Section] | None, loc: KeyPath) -> str:
    key = str(loc[-1])
    if len(loc) > 1 and key.replace("-", "_") in model.model_fields:
        return "it belongs to the top level: write it above the first [table]"
    return _unknown(key, list(table.model_fields) if table is not None else [])


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    if near:
        return f"there is no such key; did you mean {near[0]}?"
    return f"there is no such key; known are {', '.join(sorted(known))}"

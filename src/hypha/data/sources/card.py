"""The card of a dataset repository: the YAML header of its README.md may say which files are which split.

Several sets of splits are configurations, one of which is taken, as the `datasets` library does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypha.data.columns import listed
from hypha.errors import ConfigError, InputUnusable, Problem

CARD = "README.md"


@dataclass(frozen=True)
class Card:
    """``splits`` says of which split a file is; all others are data of no split."""

    splits: dict[Path, str]
    note: str


def read_card(root: Path, asked: str | None) -> Card | None:
    """What the card of ``root`` says of its files, for the configuration ``asked`` for; None when it says
    nothing. Raises InputUnusable, ConfigError.
    """
    path = root / CARD
    try:
        if not path.is_file() or not path.read_bytes().startswith(b"---"):
            return None
    except OSError as exc:
        raise InputUnusable(f"{path} cannot be read: {exc.strerror}") from exc
    from huggingface_hub import metadata_load

    try:
        header: Any = metadata_load(path)
    except Exception as exc:  # of the YAML parser, or of the text's encoding
        first = str(exc).splitlines()[0]
        raise InputUnusable(f"{path}: its header cannot be read ({first}); correct it, or remove it") from exc
    found = header.get("configs") if isinstance(header, dict) else None
    configs = {
        str(one.get("config_name", "default")): one
        for one in (found if isinstance(found, list) else [])
        if isinstance(one, dict) and one.get("data_files")
    }
    if not configs:
        return None
    name = _chosen(path, configs, asked)
    splits: dict[Path, str] = {}
    for split, pattern in _patterns(configs[name]["data_files"]):
        for match in sorted(root.glob(pattern.lstrip("/"))):
            if match.is_file():
                splits.setdefault(match, split)
            else:
                splits |= dict.fromkeys((one for one in match.rglob("*") if one.is_file()), split)
    others = [one for one in configs if one != name]
    more = f", of which {listed(others)} are left out; --config takes another" if others else ""
    return Card(splits, f"{CARD} says which files are which split (configuration {name}{more})")


def _chosen(path: Path, configs: dict[str, dict[str, Any]], asked: str | None) -> str:
    if asked is not None:
        if asked not in configs:
            message = f"{path} has no configuration {asked!r}; it has {listed(configs)}"
            raise ConfigError([Problem("config", message, "--config")])
        return asked
    if len(configs) == 1:
        return next(iter(configs))
    default = next((name for name, one in configs.items() if one.get("default") or name == "default"), None)
    if default is None:
        message = f"{path} has the configurations {listed(configs)}; name one"
        raise ConfigError([Problem("config", message, "--config")])
    return default


def _patterns(files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of all forms in which a card may have them."""
    found = []
    for one in files if isinstance(files, list) else [files]:
        if isinstance(one, dict):
            paths = one.get("path")
            split = str(one.get("split", "train"))
        else:
            paths, split = one, "train"
        found += [(split, str(path)) for path in (paths if isinstance(paths, list) else [paths]) if path]
    return found

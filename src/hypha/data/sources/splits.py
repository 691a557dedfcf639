"""Which files are training data and which are kept for tests: by the names of directories and files.

The names are those of the `datasets` library (`train`, `validation`, `test` and what else they are called),
and so are the hub's names, such as ``data/train-00000-of-00004.parquet``. A directory called `test` beside
others that are called otherwise is none: it may be a class.

The card of a dataset repository says more: the YAML header of its README.md may name which files are which
split. Several sets of splits are configurations, one of which is taken, as the `datasets` library does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypha.data.columns import listed
from hypha.errors import ConfigError, InputUnusable, Problem

CARD = "README.md"

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
#: ``--split all`` joins all of them; ``train+validation`` these two.
ALL = "all"
_SPLITS = {word: split for split, words in WORDS.items() for word in words}
#: What may stand beside such a word in a name: ``train_images``, ``val2017``, ``test-set``.
_FILLERS = frozenset({"set", "data", "images", "imgs", "img", "image", "split", "part", "shard", "samples"})
_SHARD = re.compile(r"^(.+?)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Placed:
    """A file, its split if it is in one, and the ``folders`` between the root and it, without the split's."""

    path: Path
    split: str | None
    folders: tuple[str, ...]


def place(root: Path, paths: Iterable[Path], by_words: bool) -> list[Placed]:
    """Where each file below ``root`` belongs. ``by_words``: ``mnist_train.csv`` is of a split, too, when all
    files are called so; else only ``train.csv`` and shards such as ``train-00000-of-00004.csv`` are.
    """
    placed = _by_directory(root, list(paths))
    if any(one.split for one in placed):
        return _all_named(placed)
    named = [replace(one, split=_of_file(one.path, exact=True)) for one in placed]
    if by_words and not all(one.split for one in named):
        worded = [replace(one, split=_of_file(one.path, exact=False)) for one in placed]
        named = worded if all(one.split for one in worded) else named
    return _all_named(named)


def _all_named(placed: list[Placed]) -> list[Placed]:
    """``data.csv`` beside ``test.csv`` is what to train on."""
    splits = {one.split for one in placed}
    if None in splits and len(splits) > 1 and "train" not in splits:
        return [replace(one, split=one.split or "train") for one in placed]
    return placed


def _by_directory(root: Path, paths: list[Path]) -> list[Placed]:
    folders = [path.relative_to(root).parts[:-1] for path in paths]
    below: dict[tuple[str, ...], set[str]] = {}
    for parts in folders:
        for depth, part in enumerate(parts):
            below.setdefault(parts[:depth], set()).add(part)
    levels = {where for where, names in below.items() if _are_splits(names)}
    placed = []
    for path, parts in zip(paths, folders, strict=True):
        at = next((depth for depth in range(len(parts)) if parts[:depth] in levels), None)
        if at is None:
            placed.append(Placed(path, None, parts))
        else:
            split = split_word(parts[at]) or parts[at]
            placed.append(Placed(path, split, parts[:at] + parts[at + 1 :]))
    return placed


def _are_splits(names: Collection[str]) -> bool:
    """Whether directories beside each other are splits: all are called so, or several different ones are."""
    found = [split_word(name) for name in names]
    return all(found) or len(set(found) - {None}) > 1


def split_word(name: str) -> str | None:
    """The split that a name as a whole stands for."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word and word not in _FILLERS]
    return _SPLITS.get(words[0]) if len(words) == 1 else None


def _of_file(path: Path, exact: bool) -> str | None:
    name = path.name.split(".")[0]
    if (shard := _SHARD.match(path.name)) is not None:
        words = re.split(r"[^a-z]+", shard[1].lower())
        return next((_SPLITS[word] for word in words if word in _SPLITS), shard[1])
    if exact:
        return split_word(name)
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    return next((_SPLITS[word] for word in (words[:1] + words[-1:]) if word in _SPLITS), None)


def choose(available: Sequence[str], asked: str | None, where: object) -> tuple[tuple[str, ...], str | None]:
    """Which splits are taken, and a note where there was a choice that nobody made. Raises ConfigError."""
    names = ", ".join(available)
    if asked is None:
        if len(available) == 1:
            return tuple(available), None
        if "train" not in available:
            message = f"{where} has the splits {names}; name one, or several as one+other, or {ALL!r}"
            raise ConfigError([Problem("split", message, "--split")])
        others = ", ".join(split for split in available if split != "train")
        note = f"the split train is taken, {others} left out; --split takes another, --split {ALL} joins them"
        return ("train",), note
    if asked == ALL:
        return tuple(available), None
    chosen = []
    for name in asked.split("+"):
        split = name if name in available else _SPLITS.get(name.lower(), name)
        if split not in available:
            have = f"has the splits {names}" if available else "has no splits; leave --split out"
            raise ConfigError([Problem("split", f"there is no split {name!r}: {where} {have}", "--split")])
        chosen.append(split)
    return tuple(dict.fromkeys(chosen)), None


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
    name = _configuration(path, configs, asked)
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


def _configuration(path: Path, configs: dict[str, dict[str, Any]], asked: str | None) -> str:
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

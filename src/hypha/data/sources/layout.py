"""What of the files that somebody names is data: of which kind, which split, and what is left out and why.

Directories are read to any depth. Documentation, hidden files and what operating systems leave behind are no
data, wherever they are; whoever means such a file names it itself.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from hypha.data.options import PrepareOptions, SourceKind
from hypha.data.sources.reading import data_suffix
from hypha.data.sources.splits import Placed, choose, place, read_card
from hypha.errors import ConfigError, InputUnusable, Problem

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
SUFFIXES: dict[SourceKind, frozenset[str]] = {
    "parquet": frozenset({".parquet", ".pq"}),
    "csv": frozenset({".csv", ".tsv", ".tab", ".psv"}),
    "json": frozenset({".jsonl", ".ndjson", ".json"}),
    "numpy": frozenset({".npy", ".npz"}),
    "text": frozenset({".txt", ".md", ".text"}),
    "images": IMAGE_SUFFIXES,
}
_NAMES: dict[SourceKind, str] = {
    "parquet": "Parquet files",
    "csv": "CSV files",
    "json": "JSON files",
    "numpy": "NumPy files",
    "text": "text files",
    "images": "images",
}
#: A table of this name beside images says more about them, by a column of their names.
METADATA = "metadata"
FILE_NAME = "file_name"

_DOCUMENTATION = re.compile(
    r"readme|licen[cs]e|copying|notice|authors|contributors|contributing|changelog|changes|citation"
    r"|code_of_conduct|security|datasheet"
)
_DOCUMENT_SUFFIXES = frozenset({"", ".md", ".txt", ".rst", ".cff", ".html", ".bib", ".pdf"})
#: as the `datasets` library ignores them
_DESCRIPTIONS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json", "state.json"}
)
_LEFTOVERS = frozenset({"thumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "lost+found"})
_ADVICE = {
    ".xlsx": "save it as CSV",
    ".xls": "save it as CSV",
    ".zip": "unpack it",
    ".tar": "unpack it",
    ".tgz": "unpack it",
    ".7z": "unpack it",
    ".arrow": "name the directory that save_to_disk made",
    ".pkl": "save it as .npy or Parquet",
    ".h5": "save it as .npy or Parquet",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
#: Names that wrap all there is, and are no class.
_WRAPPERS = frozenset({"data", "dataset", "images", "image", "img", "imgs"})
#: why what is left out is no data -> what is
Ignored = defaultdict[str, list[str]]


@dataclass(frozen=True)
class Layout:
    """``files`` are the data, in a fixed order, where they are in files of their own. ``ignored`` are
    lines.
    """

    kind: SourceKind
    files: tuple[Placed, ...] = ()
    #: tables beside images
    metadata: tuple[Path, ...] = ()
    #: files of the same kind in splits that were not taken
    others: tuple[Placed, ...] = ()
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def paths(self) -> list[Path]:
        return [one.path for one in self.files]


def find_layout(options: PrepareOptions) -> Layout:
    """What the sources are. Raises ConfigError when that cannot be told, InputUnusable when there is none."""
    if options.kind == "huggingface" or (
        options.kind is None and any(_is_saved(source) for source in options.sources)
    ):
        return Layout("huggingface")
    ignored = Ignored(list)
    named = [source for source in options.sources if not source.is_dir()]
    found = {source: _walk(source, options, ignored) for source in options.sources if source.is_dir()}
    everything = named + [path for paths in found.values() for path in paths]
    kind = options.kind or _kind(options, everything, ignored)
    metadata = [path for path in everything if kind == "images" and _is_metadata(path)]
    suffixes = SUFFIXES[kind]
    placed = [Placed(path, None, ()) for path in named if path not in metadata]
    notes: list[str] = []
    for root, paths in found.items():
        data = [path for path in paths if data_suffix(path) in suffixes]
        for path in paths:
            if path not in metadata and data_suffix(path) not in suffixes:
                ignored[f"not {_NAMES[kind]}"].append(_short(path, root))
        ours = place(root, data, by_words=kind not in ("text", "images"))
        if kind == "numpy" and not all(one.split for one in ours):
            # each file is a column: `labels.npy` belongs to `train_images.npy`
            ours = [replace(one, split=None) for one in ours]
        if (card := read_card(root, options.config)) is not None:
            notes.append(card.note)
            for one in ours:
                if one.path not in card.splits:
                    ignored["of no split in README.md"].append(_short(one.path, root))
            ours = [replace(one, split=card.splits[one.path]) for one in ours if one.path in card.splits]
        elif options.config is not None:
            message = f"{root} has no README.md that names configurations; leave --config out"
            raise ConfigError([Problem("config", message, "--config")])
        placed += ours
    if not placed:
        raise InputUnusable(_nothing(options, kind, ignored))
    return _chosen(options, kind, placed, metadata, ignored, notes)


def _chosen(
    options: PrepareOptions,
    kind: SourceKind,
    placed: list[Placed],
    metadata: list[Path],
    ignored: Ignored,
    notes: list[str],
) -> Layout:
    asked = options.split
    if asked is not None and not any(one.split == asked for one in placed):
        # a directory that has no name of a split, but is named as one
        placed = [
            replace(one, split=asked, folders=one.folders[1:]) if one.folders[:1] == (asked,) else one
            for one in placed
        ]
    available = sorted({one.split for one in placed if one.split}, key=_split_order)
    others: list[Placed] = []
    where = options.sources[0] if len(options.sources) == 1 else "what was named"
    if available or options.split is not None:
        splits, note = choose(available, options.split, where)
        notes += [note] if note else []
        taken = [one for one in placed if one.split in splits]
        others = [one for one in placed if one.split is not None and one.split not in splits]
        for one in [*others, *(one for one in placed if one.split is None)]:
            reason = "of no split" if one.split is None else f"of the split {one.split}"
            ignored[reason].append(_short(one.path, options.sources[0]))
        elsewhere = {one.path.parent for one in others}
        inside = {one.path.parent for one in taken}
        metadata = [path for path in metadata if path.parent not in elsewhere - inside]
        placed = taken
    _refuse_pointers([one.path for one in placed] + metadata)
    if kind in ("parquet", "csv", "json"):
        notes += _joined(placed)
    return Layout(kind, tuple(placed), tuple(metadata), tuple(others), tuple(notes), told(ignored))


def _split_order(split: str) -> tuple[int, str]:
    known = ("train", "validation", "test")
    return (known.index(split) if split in known else len(known), split)


def _joined(placed: list[Placed]) -> list[str]:
    """A note where files of several directories become one dataset. Raises InputUnusable where those are
    configurations of the hub: shards of the same name.
    """
    folders: dict[tuple[str, ...], set[str]] = {}
    for one in placed:
        if one.folders:
            folders.setdefault(one.folders, set()).add(one.path.name)
    if len(folders) < 2:
        return []
    names = ["/".join(parts) for parts in folders]
    seen: set[str] = set()
    for found in folders.values():
        if any("-of-" in name or Path(name).stem.isdigit() for name in seen & found):
            raise InputUnusable(
                f"there are several configurations of the dataset ({', '.join(names)}), with shards of the "
                "same names; name the directory of one of them"
            )
        seen |= found
    return [f"the files of {len(names)} directories are joined ({_some(names)}); name one to have it alone"]


def _is_saved(source: Path) -> bool:
    """Whether `datasets` has saved it with ``save_to_disk``."""
    if not source.is_dir():
        return False
    names = {path.name for path in source.iterdir()}
    saved = "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names
    # an unusable one, too, if there is nothing else that it could be
    return saved or (
        "dataset_info.json" in names
        and not any(path.is_dir() for path in source.iterdir())
        and not any(_kind_of(path) for path in source.iterdir() if path.name not in _DESCRIPTIONS)
    )


def _walk(root: Path, options: PrepareOptions, ignored: Ignored) -> list[Path]:
    """All files below ``root`` that may be data, sorted by path."""
    outputs = {path.resolve() for path in (options.output, options.holdout_output) if path is not None}
    visited = set()
    found = []
    for directory, directories, files in os.walk(root, onerror=_unreadable, followlinks=True):
        here = Path(directory)
        visited.add(here.resolve())
        kept = []
        for name in sorted(directories):
            resolved = (here / name).resolve()
            if (reason := no_data(here / name)) is not None:
                ignored[reason].append(_short(here / name, root) + "/")
            elif resolved not in outputs and resolved not in visited:
                kept.append(name)
        directories[:] = kept
        for name in sorted(files):
            path = here / name
            if not path.is_file():
                ignored["no file, or a link to nothing"].append(_short(path, root))
            elif (reason := no_data(path)) is not None:
                ignored[reason].append(_short(path, root))
            else:
                found.append(path)
    return sorted(found, key=lambda path: path.parts)


def _unreadable(exc: OSError) -> None:
    raise InputUnusable(
        f"{exc.filename} cannot be read: {exc.strerror}; nothing in it would be used"
    ) from exc


def _refuse_pointers(paths: list[Path]) -> None:
    """Raise InputUnusable where a repository was cloned without its large files."""
    for path in paths:
        try:
            small = path.stat().st_size < _POINTER_BYTES
            pointer = small and path.read_bytes().startswith(_POINTER)
        except OSError as exc:
            raise InputUnusable(f"{path} cannot be read: {exc.strerror}") from exc
        if pointer:
            raise InputUnusable(
                f"{path} is a pointer of Git LFS, not the file itself; fetch those with `git lfs pull`"
            )


def no_data(path: Path) -> str | None:
    """Why a file or directory is no data, by its name."""
    name = path.name.lower()
    if name.startswith("."):
        return "hidden"
    if name in _LEFTOVERS or name.startswith("~$"):
        return "of the operating system"
    if name in _DESCRIPTIONS:
        return "a description of the dataset"
    first = re.split(r"[.\-]", name)[0]
    if path.suffix.lower() in _DOCUMENT_SUFFIXES and _DOCUMENTATION.fullmatch(first) and path.is_file():
        return "documentation"
    return None


def _kind_of(path: Path) -> SourceKind | None:
    suffix = data_suffix(path)
    return next((kind for kind, known in SUFFIXES.items() if suffix in known), None)


def _kind(options: PrepareOptions, paths: list[Path], ignored: Ignored) -> SourceKind:
    counts = Counter(kind for path in paths if (kind := _kind_of(path)) is not None)
    if len(counts) > 1:
        # tables of their names beside images, a file of settings beside data, notes beside either
        weak = {path for path in paths if path not in options.sources and _is_weak(path, counts)}
        counts = Counter(kind for path in paths if path not in weak and (kind := _kind_of(path)))
    if len(counts) == 1:
        return next(iter(counts))
    what = ", ".join(str(source) for source in options.sources)
    if counts:
        examples = [
            f"{count} {_NAMES[kind]} ({next(path.name for path in paths if _kind_of(path) == kind)})"
            for kind, count in counts.most_common()
        ]
        told_kinds = f"{what} holds {' and '.join(examples)}"
        if "images" in counts:
            told_kinds += (
                f"; a table that belongs to images is called {METADATA}.csv (or .jsonl, .parquet) and has a "
                f"column {FILE_NAME}"
            )
    else:
        told_kinds = f"{what} holds nothing known" + _examples(paths, ignored)
    message = f"cannot tell what {told_kinds}; give one of {', '.join(get_args(SourceKind))}"
    raise ConfigError([Problem("kind", message, "--kind")])


def _is_weak(path: Path, counts: Counter[SourceKind]) -> bool:
    kind = _kind_of(path)
    if "images" in counts:
        return kind == "text" or _is_metadata(path) or path.suffix.lower() == ".json"
    return path.suffix.lower() in (".json", ".md") and any(other != kind for other in counts)


def _is_metadata(path: Path) -> bool:
    return path.stem.lower() == METADATA and path.suffix.lower() in (".csv", ".jsonl", ".parquet")


def _nothing(options: PrepareOptions, kind: SourceKind, ignored: Ignored) -> str:
    where = ", ".join(str(source) for source in options.sources)
    message = f"{where} holds no files ending with {' or '.join(sorted(SUFFIXES[kind]))}"
    return message + (f" (left out: {'; '.join(told(ignored))})" if ignored else "")


def _examples(paths: list[Path], ignored: Ignored) -> str:
    suffixes = {path.suffix.lower() for path in paths}
    advice = next((f" ({suffix}: {_ADVICE[suffix]})" for suffix in sorted(suffixes) if suffix in _ADVICE), "")
    if paths:
        return f", but {_some([path.name for path in paths])}{advice}"
    return f" (left out: {'; '.join(told(ignored))}; name such a file itself to use it)" if ignored else ""


def told(ignored: Ignored) -> tuple[str, ...]:
    """One line a reason."""
    return tuple(f"{_some(names)} ({reason})" for reason, names in ignored.items())


def _some(names: list[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{len(names)} such as {', '.join(names[:2])}"


def _short(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def without_wrappers(folders: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Folders without those at their beginning that hold everything and have a name such as ``data``."""
    while (
        folders
        and all(folders)
        and len({parts[0] for parts in folders}) == 1
        and (folders[0][0].lower() in _WRAPPERS)
    ):
        folders = [parts[1:] for parts in folders]
    return folders

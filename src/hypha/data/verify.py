"""Is a prepared dataset whole? Every byte is read, every difference from the manifest reported at once."""

from __future__ import annotations

from pathlib import Path

from hypha.data.manifest import (
    HOLDOUT,
    MANIFEST_FILE,
    Progress,
    column_text,
    read_manifest,
    silent,
    slice_files,
)
from hypha.data.slices import describe_slice, hash_file
from hypha.errors import DataError, Problem, SliceCorrupt
from hypha.messages import Manifest, SliceInfo


def verify(directory: Path, progress: Progress = silent) -> list[Problem]:
    """All problems of the dataset in ``directory``, and of the ``holdout`` inside it; none: it is whole.

    A problem's ``source`` is the directory, its ``key`` the file. Blocks.
    """
    directory = Path(directory)
    problems = _verify_one(directory, progress)
    if (directory / HOLDOUT).is_dir():
        problems += _verify_one(directory / HOLDOUT, progress)
    return problems


def _verify_one(directory: Path, progress: Progress) -> list[Problem]:
    source = str(directory)
    try:
        present = {path.name for path in slice_files(directory)}
        manifest = read_manifest(directory)
    except DataError as exc:
        return [Problem(key=MANIFEST_FILE, message=str(exc), source=source)]
    problems = []
    for part in manifest.slices:
        progress(f"verifying {directory / part.file}")
        if (message := slice_problem(directory / part.file, part, manifest)) is not None:
            problems.append(Problem(key=part.file, message=message, source=source))
    for name in sorted(present - {part.file for part in manifest.slices}):
        message = "the manifest does not list it, so it is never served; delete it, or delete the manifest"
        problems.append(Problem(key=name, message=message, source=source))
    return problems


def slice_problem(path: Path, expected: SliceInfo, manifest: Manifest) -> str | None:
    """What is wrong with one slice file; reads all of it."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"it has {size} bytes, the manifest says {expected.size}; restore it from a replica"
        if hash_file(path) != expected.blake3:
            return "its content is not what the manifest says (BLAKE3 differs); restore it from a replica"
        content = describe_slice(path)
    except FileNotFoundError:
        return "it is missing; restore it from a replica"
    except OSError as exc:
        return f"it cannot be read: {exc.strerror}"
    except SliceCorrupt as exc:
        return str(exc)
    columns = tuple(sorted(manifest.columns, key=lambda one: one.name))
    if content.columns != columns:
        return f"its columns are {column_text(content.columns)}, the manifest says {column_text(columns)}"
    if content.samples != expected.samples:
        return f"it holds {content.samples} samples, the manifest says {expected.samples}"
    return None

"""``manifest.json``: which slices a dataset has, in which order, and whether they are whole.

The file is canonical (sorted keys), written atomically. Its hash covers what is trained on, and so what
makes replicas interchangeable: columns, and samples, size and hash of each slice in order. It leaves out
the name and the file names, which may differ from host to host.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hypha.data.slices import SUFFIX, Ranges, columns_of, describe_slice, hash_file, mode_in
from hypha.decoding import decode_json
from hypha.errors import DataError, Problem, SliceCorrupt, Undecodable
from hypha.files.staging import write_whole
from hypha.messages import ClassNames, Column, Manifest, SliceInfo
from hypha.rules.manifests import manifest_hash

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
#: beside it, what classes of its columns are called: column -> name -> class
LABELS_FILE = "labels.json"
#: beyond it nobody reads them, and a manifest has to be answered in one message
MAX_LABELS_BYTES = 1 << 20
#: a dataset of its own in the directory of the one that it was held out of
HOLDOUT = "holdout"
MANIFEST_VERSION = 1
#: A manifest is answered in one response; this is well under its limit and still some 50,000 slices.
MAX_MANIFEST_BYTES = 9 << 20

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """A Progress that prints nothing."""


@dataclass(frozen=True)
class Dataset:
    """A directory that can be served: slice ``i`` is ``paths[i]``."""

    name: str
    directory: Path
    manifest: Manifest
    manifest_hash: str

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(self.directory / part.file for part in self.manifest.slices)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Put ``manifest.json`` into ``directory``, atomically and durably. OSError when it cannot be."""
    fields = msgspec.to_builtins(manifest) | {"version": manifest.version}
    text = msgspec.json.format(msgspec.json.encode(fields, order="sorted"), indent=1) + b"\n"
    write_whole(directory / MANIFEST_FILE, text, durable=True, mode=mode_in(directory))


def read_manifest(directory: Path) -> Manifest:
    """The manifest in ``directory``. Raises DataError when there is none, or it cannot be trusted."""
    path = directory / MANIFEST_FILE
    try:
        manifest = decode_json(path.read_bytes(), Manifest)
    except FileNotFoundError as exc:
        raise DataError(f"{path} does not exist; prepare the dataset with `hypha-data prepare`") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror}") from exc
    except Undecodable as exc:
        raise DataError(f"{path} is no manifest ({exc}); prepare the dataset again") from exc
    if manifest.version != MANIFEST_VERSION:
        raise DataError(
            f"{path} has version {manifest.version}, this is for {MANIFEST_VERSION}; prepare the dataset "
            "again"
        )
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Manifest) -> None:
    if not manifest.slices or not manifest.columns:
        raise DataError(f"{path} lists no slices or no columns; prepare the dataset again")
    seen = set()
    for part in manifest.slices:
        # a manifest may come from others: it must not name files elsewhere
        if Path(part.file).name != part.file or part.file.startswith(".") or not part.file.endswith(SUFFIX):
            raise DataError(f"{path}: {part.file!r} is no name of a slice; prepare the dataset again")
        if part.samples < 1 or part.size < 1:
            raise DataError(f"{path}: {part.file} would hold nothing; prepare the dataset again")
        if part.file in seen:
            raise DataError(f"{path}: {part.file} is listed twice; prepare the dataset again")
        seen.add(part.file)


def slice_files(directory: Path) -> list[Path]:
    """The slice files in ``directory`` by name; hidden files and sub-directories are none."""
    try:
        return sorted(
            path
            for path in directory.iterdir()
            if path.suffix == SUFFIX and not path.name.startswith(".") and path.is_file()
        )
    except OSError as exc:
        raise DataError(f"{directory} cannot be read: {exc.strerror}; is it a directory?") from exc


def make_manifest(directory: Path, name: str, progress: Progress = silent) -> Manifest:
    """The manifest of a directory of slice files, sorted by name; every byte is read.

    Raises DataError naming the file that is no slice, or differs from the first in its columns.
    """
    paths = slice_files(directory)
    if not paths:
        raise DataError(
            f"{directory} holds no *{SUFFIX} files; make some with `hypha-data prepare`, or name another "
            "directory"
        )
    first = describe_slice(paths[0])
    slices, ranges = [], Ranges()
    for path in paths:
        content = describe_slice(path)
        if content.columns != first.columns:
            raise DataError(
                f"{path} has other columns than {paths[0].name}: {column_text(content.columns)} instead of "
                f"{column_text(first.columns)}; take it out of the directory, or make it fit"
            )
        if content.samples == 0:
            raise DataError(f"{path} holds no samples; take it out of the directory")
        progress(f"hashing {path.name}")
        slices.append(
            SliceInfo(
                file=path.name, samples=content.samples, size=path.stat().st_size, blake3=hash_file(path)
            )
        )
        for column, values in columns_of(path, content.columns):
            ranges.see(column, values)
    columns = first.columns
    return Manifest(name=name, columns=columns, slices=tuple(slices), ranges=ranges.of(columns))


def column_text(columns: tuple[Column, ...]) -> str:
    """Columns as people read them: ``labels I64 [], pixel_values F32 [1, 8, 8]``."""
    return ", ".join(f"{one.name} {one.dtype} {list(one.shape)}" for one in columns)


def require_readable(directory: Path) -> None:
    """Raise DataError when it is no directory, or one that this user may not read."""
    # another user may have prepared it
    if directory.exists() and not os.access(directory, os.R_OK | os.X_OK):
        raise DataError(
            f"{directory} may not be read by this user; have it made readable (chmod -R a+rX {directory})"
        )
    if not directory.is_dir():
        raise DataError(f"{directory} is no directory; make one with `hypha-data prepare`")


def load_dataset_directory(directory: Path, name: str | None = None, progress: Progress = silent) -> Dataset:
    """A directory as a dataset, checked for what can be seen without reading the slices.

    ``name`` defaults to the manifest's. A directory of slice files without a manifest gets one, called
    like the directory. Blocks (and reads everything, then). Raises DataError that lists all problems.
    """
    directory = Path(directory)
    require_readable(directory)
    if (directory / MANIFEST_FILE).exists():
        manifest = read_manifest(directory)
        _check_files(directory, manifest)
    else:
        manifest = make_manifest(directory, name or directory.resolve().name, progress)
        try:
            write_manifest(directory, manifest)
        except OSError as exc:
            logger.warning(
                "%s has no manifest and cannot be given one (%s); its slices are hashed at every start.",
                directory,
                exc.strerror,
            )
    if name is not None:
        manifest = msgspec.structs.replace(manifest, name=name)
    if labels := read_labels(directory):
        manifest = msgspec.structs.replace(manifest, labels=labels)
    if len(msgspec.msgpack.encode(manifest)) > MAX_MANIFEST_BYTES:
        raise DataError(f"{directory} has too many slices to describe; prepare it again with larger ones")
    return Dataset(manifest.name, directory, manifest, manifest_hash(manifest))


def _check_files(directory: Path, manifest: Manifest) -> None:
    problems = []
    for part in manifest.slices:
        path = directory / part.file
        try:
            size = path.stat().st_size
        except OSError as exc:
            problems.append(f"{path} cannot be read: {exc.strerror}")
            continue
        if size != part.size:
            problems.append(f"{path} has {size} bytes, the manifest says {part.size}")
        elif not os.access(path, os.R_OK):
            problems.append(
                f"{path} may not be read by this user; have it made readable (chmod -R a+rX {directory})"
            )
    if problems:
        shown = problems[:20]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        raise DataError("\n".join([*shown, f"restore the files, or prepare {directory} again"]))
    extra = {path.name for path in slice_files(directory)} - {part.file for part in manifest.slices}
    if extra:
        logger.warning(
            "%s holds %d slice files that its manifest does not list; they are not served (such as %s).",
            directory,
            len(extra),
            min(extra),
        )


def read_labels(directory: Path) -> tuple[ClassNames, ...]:
    """Of the dataset in ``directory``. A file that cannot be used is logged, and gives no names: nothing but
    the look of a trained model depends on them.
    """
    path = directory / LABELS_FILE
    try:
        if path.stat().st_size > MAX_LABELS_BYTES:
            logger.warning("%s is larger than %d bytes; classes go without names.", path, MAX_LABELS_BYTES)
            return ()
        columns = decode_json(path.read_bytes(), dict[str, dict[str, int]])
    except FileNotFoundError:
        return ()
    except OSError as exc:
        logger.warning("%s cannot be read (%s); classes go without names.", path, exc.strerror)
        return ()
    except Undecodable as exc:
        logger.warning("%s is not what prepare writes (%s); classes go without names.", path, exc)
        return ()
    found = []
    for column, ids in sorted(columns.items()):
        names = sorted(ids, key=lambda name: ids[name])
        if not names or [ids[name] for name in names] != list(range(len(names))):
            logger.warning(
                "%s does not number the classes of %s from 0 on; they go without names.", path, column
            )
            continue
        found.append(ClassNames(column=column, names=tuple(names)))
    return tuple(found)


def verify(directory: Path, progress: Progress = silent) -> list[Problem]:
    """All problems of the dataset in ``directory``, and of the ``holdout`` inside it; none: it is whole.

    A problem's ``source`` is the directory, its ``key`` the file. Blocks.
    """
    problems = _verify_one(Path(directory), progress)
    if (inside := Path(directory) / HOLDOUT).is_dir():
        problems += _verify_one(inside, progress)
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

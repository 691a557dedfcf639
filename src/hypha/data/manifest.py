"""``manifest.json``: which slices a dataset has, in which order, and how to know that they are whole.

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

from hypha.data.labels import read_labels
from hypha.data.ranges import Ranges
from hypha.data.slices import (
    SUFFIX,
    columns_of,
    describe_slice,
    hash_file,
    mode_in,
)
from hypha.decoding import decode_json
from hypha.errors import DataError, Undecodable
from hypha.files.staging import write_whole
from hypha.messages import Column, Manifest, SliceInfo
from hypha.rules.manifests import manifest_hash

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
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
        """The slice files, in the manifest's order."""
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

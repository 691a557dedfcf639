"""From any source to a dataset that can be served: slices and a manifest, there as a whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hypha.data.columns import Shaper
from hypha.data.manifest import Progress, manifest_hash, silent
from hypha.data.options import DEFAULT_SLICE_MB, PrepareOptions, check_options
from hypha.data.pipeline import Holdout, Shuffle, SliceWriter, Stage, samples_for
from hypha.data.slices import Array, sync
from hypha.data.sources.opening import Source, open_source
from hypha.data.staging import HOLDOUT, LABELS_FILE, Staging
from hypha.errors import DataError, InputUnusable
from hypha.messages import Column, Manifest

logger = logging.getLogger("hypha.data")

#: A job with fewer slices than workers leaves some without data.
FEW_SLICES = 4


@dataclass(frozen=True)
class Prepared:
    """What was made. ``notes`` are sentences the user should read."""

    directory: Path
    manifest: Manifest
    manifest_hash: str
    holdout_directory: Path | None = None
    holdout: Manifest | None = None
    labels: dict[str, tuple[str, ...]] | None = None
    notes: tuple[str, ...] = ()


def prepare(options: PrepareOptions, progress: Progress = silent) -> Prepared:
    """Prepare a dataset; blocks. The same source and options give the same bytes anywhere.

    Raises ConfigError (all problems of the options), DataError naming the file, row or column. Whatever
    ends it, the output is there as a whole or as it was before. Needs about the dataset's size of room
    beside the output, twice that while shuffling.
    """
    check_options(options)
    _keep_apart(options)
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(Staging(options.output, options.force))
        apart = None
        if options.holdout and options.holdout_output is not None:
            apart = stack.enter_context(Staging(options.holdout_output, options.force))
        source = open_source(options)
        try:
            prepared = _Run(options, source, progress).run(staging, apart)
        except OSError as exc:
            raise DataError(f"{options.output} cannot be prepared: {exc}; is the disk full?") from exc
        if apart is not None:
            apart.publish()
        staging.publish()
    return prepared


def _keep_apart(options: PrepareOptions) -> None:
    outputs = [options.output.resolve()]
    if options.holdout_output is not None:
        outputs.append(options.holdout_output.resolve())
        if outputs[0] == outputs[1] or outputs[0] in outputs[1].parents or outputs[1] in outputs[0].parents:
            raise InputUnusable(
                f"{outputs[0]} and {outputs[1]} cannot hold two datasets; name separate directories"
            )
    for source in (path.resolve() for path in options.sources):
        for output in outputs:
            if output == source or output in source.parents:
                raise InputUnusable(
                    f"the output {output} is or holds the source {source}; name another directory"
                )


class _Run:
    def __init__(self, options: PrepareOptions, source: Source, progress: Progress) -> None:
        self._options = options
        self._source = source
        self._progress = progress
        self._shaper = Shaper(options)

    def run(self, staging: Staging, apart: Staging | None) -> Prepared:
        options = self._options
        rows = self._records()
        first = next(rows, None)
        if first is None:
            raise InputUnusable(f"{options.sources[0]} has no samples")
        columns = self._shaper.columns
        train = self._writer(
            staging.directory, options.dataset_name, columns, "every sample is in the holdout"
        )
        stage: Stage = Shuffle(train, staging.directory, options.seed) if options.shuffle else train
        held_out = None
        if options.holdout:
            inside = apart.directory if apart is not None else staging.directory / HOLDOUT
            inside.mkdir(exist_ok=True)
            empty = f"a holdout of {options.holdout:g} leaves no sample in it; take more"
            held_out = self._writer(inside, f"{options.dataset_name}-{HOLDOUT}", columns, empty)
            stage = Holdout(stage, held_out, options.holdout, options.seed)
        total = len(first)
        stage.write(first)
        for some in rows:
            total += len(some)
            self._progress(f"{total} samples read")
            stage.write(some)
        stage.close()
        labels = self._labels()
        for writer in (train, held_out):
            if labels and writer is not None:
                _write_labels(writer.directory, labels)
        if held_out is not None:
            sync(held_out.directory)
        return Prepared(
            directory=options.output,
            manifest=train.manifest,
            manifest_hash=manifest_hash(train.manifest),
            holdout_directory=(options.holdout_output or options.output / HOLDOUT) if held_out else None,
            holdout=held_out.manifest if held_out else None,
            labels=labels or None,
            notes=tuple(self._notes(train.manifest)),
        )

    def _records(self) -> Iterator[Array]:
        for block in self._source.blocks():
            yield self._shaper.records(block)

    def _writer(self, directory: Path, name: str, columns: tuple[Column, ...], empty: str) -> SliceWriter:
        options = self._options
        samples = options.slice_samples or samples_for(
            columns, (options.slice_mb or DEFAULT_SLICE_MB) * 10**6
        )
        return SliceWriter(directory, name, columns, samples, empty)

    def _labels(self) -> dict[str, tuple[str, ...]]:
        """By the dataset's columns; of those that are ids still."""
        names = {column.name for column in self._shaper.columns}
        found = {}
        for source_name, values in self._source.labels.items():
            name = self._options.rename.get(source_name, source_name)
            if name in names:
                found[name] = values
        return found

    def _notes(self, manifest: Manifest) -> Iterator[str]:
        yield from self._source.notes
        if len(manifest.slices) < FEW_SLICES:
            yield (
                f"there are only {len(manifest.slices)} slices, and a slice goes to one worker at a time; "
                "make "
                "smaller ones for more workers"
            )


def _write_labels(directory: Path, labels: dict[str, tuple[str, ...]]) -> None:
    """``labels.json``: column -> name -> id."""
    ids = {column: {name: number for number, name in enumerate(names)} for column, names in labels.items()}
    path = directory / LABELS_FILE
    with path.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(ids), indent=1) + b"\n")
        file.flush()
        os.fsync(file.fileno())

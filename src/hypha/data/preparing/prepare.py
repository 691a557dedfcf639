"""From any source to a dataset that can be served: slices and a manifest, there as a whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import msgspec

from hypha.data.columns import Shaper, listed
from hypha.data.labels import LABELS_FILE
from hypha.data.manifest import HOLDOUT, Progress, silent
from hypha.data.options import DEFAULT_SLICE_MB, PrepareOptions, check_options
from hypha.data.preparing.pipeline import Holdout, Shuffle, SliceWriter, Stage, samples_for
from hypha.data.preparing.staging import Staging, check_target
from hypha.data.preparing.summary import RowCounts, Summary
from hypha.data.slices import Array
from hypha.data.sources.layout import find_layout
from hypha.data.sources.opening import open_source
from hypha.errors import DataError, InputUnusable
from hypha.messages import Column, Manifest
from hypha.rules.manifests import manifest_hash

logger = logging.getLogger(__name__)

#: A job with fewer slices than workers leaves some without data.
FEW_SLICES = 4


@dataclass(frozen=True)
class Prepared:
    """What was made. ``notes`` are sentences the user should read."""

    directory: Path
    manifest: Manifest
    manifest_hash: str
    summary: Summary
    holdout_directory: Path | None = None
    holdout: Manifest | None = None
    labels: dict[str, tuple[str, ...]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What would be made: ``samples`` to train on in ``slices``, ``held_out`` apart."""

    summary: Summary
    samples: int
    held_out: int
    slices: int
    notes: tuple[str, ...]


def prepare(options: PrepareOptions, progress: Progress = silent) -> Prepared:
    """Prepare a dataset; blocks. The same source and options give the same bytes anywhere.

    Raises ConfigError (all problems of the options), InputUnusable naming the file, row or column,
    DataError. Whatever ends it, the output is there as a whole or as it was before. Needs about the
    dataset's size of room beside the output, twice that while shuffling.
    """
    check_options(options)
    _keep_apart(options)
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(Staging(options.output, options.force))
        apart = None
        if options.holdout and options.holdout_output is not None:
            apart = stack.enter_context(Staging(options.holdout_output, options.force))
        run = _Run(options, progress)
        try:
            prepared = run.write(staging, apart)
        except OSError as exc:
            raise DataError(f"{options.output} cannot be prepared: {exc}; is the disk full?") from exc
        if apart is not None:
            apart.publish()
        staging.publish()
    return prepared


def survey(options: PrepareOptions, progress: Progress = silent) -> Survey:
    """All that :func:`prepare` does but writing: every sample is read. Raises what it does."""
    check_options(options)
    _keep_apart(options)
    outputs = [options.output] + ([options.holdout_output] if options.holdout_output is not None else [])
    for output in outputs:
        check_target(output, options.force)
    return _Run(options, progress).count()


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
    def __init__(self, options: PrepareOptions, progress: Progress) -> None:
        self._options = options
        self._layout = find_layout(options)
        self._source = open_source(self._layout, options)
        self._progress = progress
        self._shaper = Shaper(options)
        self._tally = RowCounts()

    def write(self, staging: Staging, apart: Staging | None) -> Prepared:
        options = self._options
        rows = self._records()
        first = self._first(rows)
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
        stage.write(first)
        for some in rows:
            self._progress(f"{self._tally.rows} samples read")
            stage.write(some)
        stage.close()
        labels = self._labels()
        for writer in (train, held_out):
            if labels and writer is not None:
                _write_labels(writer.directory, labels)
        return Prepared(
            directory=options.output,
            manifest=train.manifest,
            manifest_hash=manifest_hash(train.manifest),
            summary=self._summary(),
            holdout_directory=(options.holdout_output or options.output / HOLDOUT) if held_out else None,
            holdout=held_out.manifest if held_out else None,
            labels=labels or None,
            notes=tuple(self._notes(len(train.manifest.slices))),
        )

    def count(self) -> Survey:
        options = self._options
        rows = self._records()
        self._first(rows)
        for _ in rows:
            self._progress(f"{self._tally.rows} samples read")
        held_out = round(self._tally.rows * options.holdout)
        samples = self._tally.rows - held_out
        if options.holdout and not (samples and held_out):
            raise InputUnusable(f"a holdout of {options.holdout:g} leaves one side without a sample")
        slices = math.ceil(samples / self._slice_samples(self._shaper.columns))
        return Survey(self._summary(), samples, held_out, slices, tuple(self._notes(slices)))

    def _first(self, rows: Iterator[Array]) -> Array:
        first = next(rows, None)
        if first is None:
            left_out = [f"; {note}" for note in self._source.notes]
            raise InputUnusable(f"{self._options.sources[0]} has no samples{''.join(left_out)}")
        return first

    def _records(self) -> Iterator[Array]:
        named: frozenset[str] | None = None
        for block in self._source.blocks():
            records = self._shaper.records(block)
            if named is None:
                named = frozenset(self._labels())
            self._tally.see(records, self._shaper.columns, named)
            if len(records):
                yield records

    def _slice_samples(self, columns: tuple[Column, ...]) -> int:
        options = self._options
        return options.slice_samples or samples_for(columns, (options.slice_mb or DEFAULT_SLICE_MB) * 10**6)

    def _writer(self, directory: Path, name: str, columns: tuple[Column, ...], empty: str) -> SliceWriter:
        return SliceWriter(directory, name, columns, self._slice_samples(columns), empty)

    def _summary(self) -> Summary:
        return self._tally.summary(
            self._layout.kind,
            len(self._layout.files),
            self._shaper.columns,
            self._labels(),
            self._layout.ignored,
        )

    def _labels(self) -> dict[str, tuple[str, ...]]:
        """By the dataset's columns; of those that are ids still."""
        names = {column.name for column in self._shaper.columns}
        found = {}
        for source_name, values in self._source.labels.items():
            name = self._options.rename.get(source_name, source_name)
            if name in names:
                found[name] = values
        return found

    def _notes(self, slices: int) -> Iterator[str]:
        yield from self._layout.notes
        yield from self._source.notes
        for name in sorted(self._shaper.narrowed):
            yield (
                f"column {name!r} has large whole numbers, which lose digits as F32; "
                f"--dtype {quote(name)}=F64 keeps them"
            )
        for name, counter in self._tally.unnamed(self._labels()).items():
            ids = listed(str(number) for number in sorted(counter))
            yield (
                f"{counter.total()} rows have a label without a name in column {name!r} ({ids}); models "
                "refuse such labels, -100 excepted, which no loss counts"
            )
        if slices < FEW_SLICES:
            only = "there is only 1 slice" if slices == 1 else f"there are only {slices} slices"
            yield (
                f"{only}, and a slice goes to one worker at a time; make smaller ones with --slice-samples "
                "for more workers"
            )


def _write_labels(directory: Path, labels: dict[str, tuple[str, ...]]) -> None:
    """``labels.json``: column -> name -> id."""
    ids = {column: {name: number for number, name in enumerate(names)} for column, names in labels.items()}
    (directory / LABELS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(ids), indent=1) + b"\n")

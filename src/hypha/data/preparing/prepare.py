"""From any source to a dataset that can be served: slices and a manifest, there as a whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import msgspec
import numpy as np

from hypha.data.columns import Shaper, listed
from hypha.data.manifest import HOLDOUT, LABELS_FILE, Progress, silent
from hypha.data.options import DEFAULT_SLICE_MB, PrepareOptions, SourceKind, check_options
from hypha.data.preparing.pipeline import Holdout, Shuffle, SliceWriter, Stage, samples_for
from hypha.data.preparing.staging import Staging, check_target
from hypha.data.slices import Array
from hypha.data.sources.layout import Layout, find_layout
from hypha.data.sources.opening import open_source
from hypha.errors import DataError, InputUnusable
from hypha.messages import Column, Manifest
from hypha.rules.manifests import manifest_hash

logger = logging.getLogger(__name__)

#: A job with fewer slices than workers leaves some without data.
FEW_SLICES = 4
#: More different labels than these are not counted one by one.
MAX_COUNTED = 1000
#: So many labels are shown, and so many values of an example.
SHOWN_LABELS = 12
SHOWN_VALUES = 6
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Summary:
    """``labels`` are names (or numbers) with how many rows have them, by column; ``ignored`` are lines."""

    kind: SourceKind
    files: int
    rows: int
    columns: tuple[Column, ...]
    examples: Mapping[str, str]
    labels: Mapping[str, tuple[tuple[str, int], ...]]
    ignored: tuple[str, ...]

    def lines(self) -> list[str]:
        files = f" from {self.files} files" if self.files > 1 else ""
        found = [f"kind: {self.kind}", f"rows: {self.rows}{files}"]
        for column in self.columns:
            shape = f" {list(column.shape)}" if column.shape else ""
            found.append(f"column: {column.name} {column.dtype}{shape}, such as {self.examples[column.name]}")
        for name, counts in self.labels.items():
            shown = ", ".join(f"{label} ({count})" for label, count in counts[:SHOWN_LABELS])
            more = f" and {len(counts) - SHOWN_LABELS} more" if len(counts) > SHOWN_LABELS else ""
            found.append(f"labels: {name} has {len(counts)}: {shown}{more}")
        found += [f"ignored: {line}" for line in self.ignored]
        return found


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
        stack.enter_context(staging := Staging(options.output, options.force))
        apart = None
        if options.holdout and options.holdout_output is not None:
            stack.enter_context(apart := Staging(options.holdout_output, options.force))
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
        train = self._writer(staging.path, options.dataset_name, "every sample is in the holdout")
        stage: Stage = Shuffle(train, staging.path, options.seed) if options.shuffle else train
        held_out = None
        if options.holdout:
            inside = apart.path if apart is not None else staging.path / HOLDOUT
            inside.mkdir(exist_ok=True)
            empty = f"a holdout of {options.holdout:g} leaves no sample in it; take more"
            held_out = self._writer(inside, f"{options.dataset_name}-{HOLDOUT}", empty)
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
        slices = math.ceil(samples / self._slice_samples())
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

    def _slice_samples(self) -> int:
        slice_bytes = (self._options.slice_mb or DEFAULT_SLICE_MB) * 10**6
        return self._options.slice_samples or samples_for(self._shaper.columns, slice_bytes)

    def _writer(self, directory: Path, name: str, empty: str) -> SliceWriter:
        return SliceWriter(directory, name, self._shaper.columns, self._slice_samples(), empty)

    def _summary(self) -> Summary:
        return self._tally.summary(self._layout, self._shaper.columns, self._labels())

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


@dataclass
class RowCounts:
    rows: int = 0
    _first: Array | None = None
    _counts: dict[str, Counter[int]] = field(default_factory=dict)
    _many: set[str] = field(default_factory=set)

    def see(self, records: Array, columns: tuple[Column, ...], named: frozenset[str]) -> None:
        """Take note of some rows; ``named`` are columns of ids that have names."""
        if self._first is None and len(records):
            self._first = records[:1].copy()
        self.rows += len(records)
        for column in columns:
            counted = column.name in named or (column.name in _LABELS and column.dtype[0] in "IU")
            if not counted or column.shape or column.name in self._many:
                continue
            values, counts = np.unique(records[column.name], return_counts=True)
            counter = self._counts.setdefault(column.name, Counter())
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if len(counter) > MAX_COUNTED and column.name not in named:
                self._many.add(column.name)
                del self._counts[column.name]

    def unnamed(self, names: Mapping[str, tuple[str, ...]]) -> dict[str, Counter[int]]:
        """Ids that have none of their column's names, with how many rows have them."""
        odd = {
            column: Counter(
                {number: n for number, n in counter.items() if not 0 <= number < len(names[column])}
            )
            for column, counter in self._counts.items()
            if column in names
        }
        return {column: counter for column, counter in odd.items() if counter}

    def summary(
        self, layout: Layout, columns: tuple[Column, ...], names: Mapping[str, tuple[str, ...]]
    ) -> Summary:
        """All that was seen; ``names`` are those behind ids, by column."""
        labels = {}
        for column, counter in self._counts.items():
            known = names.get(column, ())
            counts = {name: counter.get(number, 0) for number, name in enumerate(known)}
            counts |= {
                str(number): count
                for number, count in sorted(counter.items())
                if not 0 <= number < len(known)
            }
            labels[column] = tuple(counts.items())
        examples = {}
        if self._first is not None:
            examples = {column.name: _shown(column, self._first[column.name][0]) for column in columns}
        files = len(layout.files)
        return Summary(layout.kind, files, self.rows, columns, examples, labels, layout.ignored)


def _shown(column: Column, value: Array) -> str:
    if column.dtype == "BF16":
        value = (np.asarray(value).astype(np.uint32) << 16).view(np.float32)
    flat = np.asarray(value).reshape(-1)
    texts = [f"{one:.6g}" if flat.dtype.kind == "f" else str(one) for one in flat[:SHOWN_VALUES].tolist()]
    return " ".join(texts) + (" ..." if len(flat) > SHOWN_VALUES else "")

"""The options of ``hypha-data prepare``, and what of it cannot be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hypha.data.slices import DTYPES
from hypha.errors import ConfigError, Problem

SourceKind = Literal["huggingface", "images", "csv", "json", "parquet", "text", "numpy"]
#: names for what is hard to type
DELIMITERS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
#: the tokenizer that needs no files: UTF-8 bytes are ids 0 to 255
BYTES = "bytes"
DEFAULT_SLICE_MB = 64.0


@dataclass(frozen=True)
class PrepareOptions:
    """One run of prepare. Sizes are MB of 10^6 bytes.

    Columns go through, in this order: ``features`` (new column -> source columns, or shell patterns of
    them in the source's order, joined into one tensor), ``columns`` (the only ones to keep, if any are
    named; by source or feature name), ``rename`` (old -> new); ``scales`` (factors), ``shapes`` (of one
    sample) and ``dtypes`` (as safetensors spells them) go by the new names. 64-bit floats become ``F32``
    unless ``dtypes`` says otherwise.
    """

    sources: tuple[Path, ...]
    output: Path
    #: of the dataset; the output directory's name when None. The holdout is called ``<name>-holdout``.
    name: str | None = None
    #: found out from the source when None
    kind: SourceKind | None = None
    #: such as ``train``, ``train+validation`` or ``all``; ``train`` where there are several and None is given
    split: str | None = None
    #: of a dataset repository whose README.md names several
    config: str | None = None
    columns: tuple[str, ...] = ()
    #: columns of the source to leave out
    drop: tuple[str, ...] = ()
    #: rows in which a column has no value: an error, or left out (and counted)
    missing: Literal["refuse", "drop"] = "refuse"
    #: column of the source -> what stands where it has no value
    fill: Mapping[str, str] = field(default_factory=dict)
    #: column of lists of different lengths -> what they are filled up with, to the length of the longest
    pad: Mapping[str, float] = field(default_factory=dict)
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    #: False: columns of a CSV file are called f0, f1, ...
    csv_header: bool = True
    #: between the fields of a CSV file, and within its numbers; found out when None
    delimiter: str | None = None
    decimal: Literal[".", ","] | None = None
    #: of text, CSV and JSON files, as Python calls it; by their byte order mark, or UTF-8, when None
    encoding: str | None = None
    #: height and width; images of different sizes need it
    image_size: tuple[int, int] | None = None
    image_channels: Literal[1, 3, 4] = 3
    #: directory with a ``tokenizer.json``, that file, or ``bytes``; makes any source of text a text source
    tokenizer: str | None = None
    sequence_length: int = 1024
    #: where a table's text is
    text_column: str = "text"
    #: by samples or by MB, not both; 64 MB when neither is given
    slice_samples: int | None = None
    slice_mb: float | None = None
    #: share of the samples that goes to a second dataset, drawn evenly over the source
    holdout: float = 0.0
    #: where that goes; ``<output>/holdout`` when None
    holdout_output: Path | None = None
    shuffle: bool = True
    seed: int = 0
    #: replace a prepared dataset at ``output``
    force: bool = False

    @property
    def field_delimiter(self) -> str | None:
        """The delimiter as a character."""
        return DELIMITERS.get(self.delimiter, self.delimiter) if self.delimiter is not None else None

    @property
    def dataset_name(self) -> str:
        return self.name or self.output.resolve().name


def check_options(options: PrepareOptions) -> None:
    """Raise a ConfigError with all problems that need no look at the source."""
    problems = [Problem(key=key, message=message) for key, message in _problems(options)]
    if problems:
        raise ConfigError(problems)


def _problems(options: PrepareOptions) -> Iterator[tuple[str, str]]:
    if not options.sources:
        yield "source", "nothing to prepare from; name a file or directory"
    for source in options.sources:
        if not source.exists():
            yield "source", f"{source} does not exist"
    if options.slice_samples is not None and options.slice_mb is not None:
        yield (
            "slice_samples",
            "slices are cut by samples or by MB; give one of --slice-samples and --slice-mb",
        )
    if options.slice_samples is not None and options.slice_samples < 1:
        yield "slice_samples", f"a slice of {options.slice_samples} samples holds nothing; take at least 1"
    if options.slice_mb is not None and not options.slice_mb > 0:
        yield "slice_mb", f"a slice of {options.slice_mb:g} MB holds nothing; take more than 0"
    if not 0 <= options.holdout < 1:
        yield "holdout", f"the holdout is a share from 0 to below 1, not {options.holdout:g}"
    if options.holdout_output is not None and not options.holdout:
        yield "holdout_output", "there is no holdout to put there; give --holdout"
    if options.sequence_length < 2:
        yield "sequence_length", f"a sequence of {options.sequence_length} teaches nothing; take at least 2"
    if options.field_delimiter is not None and len(options.field_delimiter) != 1:
        yield "delimiter", f"one character, or one of {', '.join(DELIMITERS)}, not {options.delimiter!r}"
    if options.decimal is not None and options.decimal == options.field_delimiter:
        yield "decimal", f"{options.decimal!r} cannot be between fields and within numbers"
    if options.image_size is not None and min(options.image_size) < 1:
        yield "image_size", "height and width are at least 1"
    for column, dtype in options.dtypes.items():
        if dtype not in DTYPES:
            yield "dtypes", f"column {column!r}: there is no dtype {dtype!r}; take one of {', '.join(DTYPES)}"
    for column, shape in options.shapes.items():
        if not shape or min(shape) < 1:
            yield "shapes", f"column {column!r}: a shape is numbers from 1, such as 1,28,28"
    for column, names in options.features.items():
        if not names:
            yield "features", f"{column!r} is made of no columns; name some, such as {column}=x1,x2"
    if not options.dataset_name.isprintable() or options.dataset_name.strip("/ ") != options.dataset_name:
        yield (
            "name",
            f"{options.dataset_name!r} is no name for a dataset; take printable text without a slash at its "
            "ends",
        )

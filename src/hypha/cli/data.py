"""``hypha-data``: prepares, verifies and serves datasets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hypha.cli import component as common
from hypha.cli.options import InitOptions, RunOptions, with_options
from hypha.cli.running import run_program, run_service
from hypha.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from hypha.data.serving.slice_advice import Fit, SliceAdvice

COMPONENT = "data"
app = common.make_app(COMPONENT, "Prepares, verifies and serves datasets.")

DatasetPathOption = Annotated[
    list[Path] | None,
    typer.Option("--dataset-path", "-d", help="A prepared dataset to serve. May be repeated."),
]


def _datasets(paths: list[Path] | None) -> dict[str, object]:
    if paths and len(paths) == 1:
        return {"dataset_path": paths[0]}
    return {"datasets": [{"path": str(path.absolute())} for path in paths or ()]}


@app.command()
@with_options
def init(options: InitOptions, dataset_path: DatasetPathOption = None) -> None:
    """Write a configuration file with every key, its default and what it means."""
    fill_in = {} if dataset_path else {"dataset_path": "a directory made by `hypha-data prepare`"}
    common.write_config(COMPONENT, options, _datasets(dataset_path or [Path("dataset")]), fill_in)


@app.command()
@with_options
def run(options: RunOptions, dataset_path: DatasetPathOption = None) -> None:
    """Serve datasets until SIGINT or SIGTERM."""
    served = next(iter(_datasets(dataset_path).items())) if dataset_path else ("dataset_path", None)
    loaded = common.load_to_run(COMPONENT, options, ("--dataset-path", *served))
    from hypha.data import run_data

    raise typer.Exit(run_service("hypha-data", loaded, lambda: run_data(loaded)))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A prepared dataset.")],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only problems.")] = False,
) -> None:
    """Read every slice and compare it with the manifest; exit 1 when something is wrong."""
    from hypha.data.manifest import read_manifest, silent
    from hypha.data.manifest import verify as verify_dataset
    from hypha.rules.manifests import manifest_hash

    problems = verify_dataset(directory, silent if quiet else typer.echo)
    for problem in problems:
        typer.echo(f"PROBLEM {problem}")
    if problems:
        raise typer.Exit(1)
    typer.echo(f"OK: {directory} is whole; its manifest_hash is {manifest_hash(read_manifest(directory))}")


@dataclass(frozen=True, kw_only=True)
class PaceOptions:
    """How workers train, and what leads to them."""

    workers: Annotated[int, typer.Option(min=1, help="Workers that train at once.")] = 2
    batch_s: Annotated[float, typer.Option(help="Seconds that a worker takes for one batch.")] = 0.5
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a batch.")] = 16
    mbit: Annotated[float, typer.Option(help="What one data node can send, in Mbit/s.")] = 100.0
    data_nodes: Annotated[int, typer.Option(min=1, help="Data nodes with this dataset.")] = 1
    worker_mbit: Annotated[
        float | None, typer.Option(help="What one worker can receive, in Mbit/s; default: any amount.")
    ] = None
    start_s: Annotated[float, typer.Option(help="How long the first slices may take.")] = 10.0
    cache_gb: Annotated[float, typer.Option(help="The workers' cache.max_gb.")] = 20.0
    cache_slices: Annotated[int, typer.Option(min=2, help="The workers' cache.max_slices.")] = 10


@app.command()
@with_options
def advise(
    directory: Annotated[
        Path | None,
        typer.Argument(help="A prepared dataset: its samples count, and whether it fits is said."),
    ] = None,
    *,
    given: PaceOptions,
    sample_bytes: Annotated[
        float | None, typer.Option(help="Bytes of one sample, where no dataset is given.")
    ] = None,
    round_trip_ms: Annotated[float, typer.Option(help="Between worker and data node.")] = 50.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Say how large slices should be, and why; and whether those of a prepared dataset are."""
    from hypha.data.manifest import read_manifest
    from hypha.data.serving.slice_advice import TrainingPace, fit
    from hypha.data.serving.slice_advice import advise as advise_slices

    amounts = asdict(given) | {"sample_bytes": sample_bytes}
    for name, value in amounts.items():
        if value is not None and not 0 < value < float("inf"):
            raise typer.BadParameter(f"--{name.replace('_', '-')} is more than 0, not {value:g}")
    if not 0 <= round_trip_ms < float("inf"):
        raise typer.BadParameter(f"--round-trip-ms is 0 or more, not {round_trip_ms:g}")
    if (directory is None) == (sample_bytes is None):
        raise typer.BadParameter("give a prepared dataset, or --sample-bytes")
    pace = TrainingPace(**asdict(given), sample_bytes=sample_bytes or 1.0, round_trip_s=round_trip_ms / 1000)
    fitting: Fit | None = None
    if directory is None:
        advice = advise_slices(pace)
    else:
        manifest = read_manifest(directory)
        if not manifest.samples:
            raise DataError(f"{directory} has no samples; prepare it again")
        size = float(sum(part.size for part in manifest.slices))
        pace = replace(pace, sample_bytes=size / manifest.samples, dataset_bytes=size)
        advice = advise_slices(pace)
        fitting = fit(manifest, pace, advice)
    if as_json:
        found = None if fitting is None else {**asdict(fitting), "fits": fitting.fits}
        typer.echo(json.dumps({**asdict(advice), "fit": found}, indent=1))
    else:
        typer.echo("\n".join(_advice_lines(advice, fitting, directory)))


def _advice_lines(advice: SliceAdvice, fitting: Fit | None, directory: Path | None) -> list[str]:
    lines = [
        f"slices of {advice.slice_mb:g} MB: hypha-data prepare --slice-mb {advice.slice_mb:g} (or "
        f"--slice-samples {advice.slice_samples})",
        f"each is trained on for {advice.lasts_s:.3g} s, and fetched in {advice.fetched_in_s:.2g} s when all "
        "workers fetch",
        *(f"because {text}" for text in advice.because),
        *(f"problem: {text}" for text in advice.problems),
    ]
    if fitting is not None:
        size = f"{directory}: {fitting.slices} slices of {fitting.mean_mb:.2g} MB"
        lines += [f"{size} fit"] if fitting.fits else [f"{size} do not fit"]
        lines += [f"problem: {text}" for text in fitting.problems]
    return lines


def _pairs(name: str, texts: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (equals and key and value):
            raise ConfigError([Problem("", f"write COLUMN=VALUE, not {text!r}", name)])
        pairs[key] = value
    return pairs


def _numbers(name: str, text: str, separators: str = ",x") -> tuple[int, ...]:
    for separator in separators:
        text = text.replace(separator, " ")
    try:
        return tuple(int(part) for part in text.split())
    except ValueError as exc:
        raise ConfigError([Problem("", f"numbers are needed, such as 28,28, not {text!r}", name)]) from exc


def _number(name: str, text: str) -> float:
    """A factor; ``1/255`` is easier to write than 0.00392."""
    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError) as exc:
        raise ConfigError(
            [Problem("", f"a factor is needed, such as 0.5 or 1/255, not {text!r}", name)]
        ) from exc


Pairs = list[str] | None


@dataclass(frozen=True, kw_only=True)
class PlainOptions:
    """What is prepared as it is given."""

    name: Annotated[str | None, typer.Option("--name", "-n", help="Dataset name; default: OUTPUT's.")] = None
    split: Annotated[str | None, typer.Option(help="Such as train (the default), test, train+test, all.")] = (
        None
    )
    config: Annotated[
        str | None, typer.Option(help="Configuration of a hub repository whose README.md names several.")
    ] = None
    missing: Annotated[
        Literal["refuse", "drop"], typer.Option(help="Rows with missing values: refuse, or drop.")
    ] = "refuse"
    delimiter: Annotated[
        str | None, typer.Option(help="Of CSV: a character, tab, semicolon, pipe; default: found out.")
    ] = None
    decimal: Annotated[
        Literal[".", ","] | None, typer.Option(help="Of CSV: . or , (default: found out).")
    ] = None
    encoding: Annotated[
        str | None, typer.Option(help="Of text: latin-1, cp1252, utf-16 ...; default: UTF-8, or by its mark.")
    ] = None
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer.json, its directory, or bytes.")] = None
    sequence_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 1024
    text_column: Annotated[str, typer.Option(help="Where a table's text is.")] = "text"
    slice_samples: Annotated[int | None, typer.Option(help="Samples a slice.")] = None
    slice_mb: Annotated[float | None, typer.Option(help="MB a slice; 64 when nothing is said.")] = None
    holdout: Annotated[float, typer.Option(help="Share held out as a second dataset.")] = 0.0
    holdout_output: Annotated[Path | None, typer.Option(help="Where to; default OUTPUT/holdout.")] = None
    seed: Annotated[int, typer.Option(help="Of shuffle and holdout.")] = 0
    force: Annotated[bool, typer.Option("--force", help="Replace a prepared dataset at OUTPUT.")] = False


@app.command()
@with_options
def prepare(
    sources: Annotated[
        list[Path],
        typer.Argument(help="A directory as the hub has it, an image folder, or files of one kind."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for slices and manifest.")],
    *,
    plain: PlainOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read everything and tell what would be made; write nothing.")
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option(help="huggingface, images, csv, json, parquet, text, numpy; default: found out."),
    ] = None,
    column: Annotated[
        Pairs, typer.Option("--column", "--columns", help="Keep only these: A or A,B. May be repeated.")
    ] = None,
    drop: Annotated[Pairs, typer.Option(help="Leave these columns out: A or A,B. May be repeated.")] = None,
    fill: Annotated[Pairs, typer.Option(help="COLUMN=VALUE where there is none.")] = None,
    pad: Annotated[Pairs, typer.Option(help="COLUMN=NUMBER at the end of lists that are shorter.")] = None,
    feature: Annotated[
        Pairs, typer.Option(help="NEW=COLUMN,COLUMN or pattern: join columns into one tensor.")
    ] = None,
    rename: Annotated[Pairs, typer.Option(help="OLD=NEW.")] = None,
    dtype: Annotated[Pairs, typer.Option(help="COLUMN=F32 and so on.")] = None,
    shape: Annotated[Pairs, typer.Option(help="COLUMN=1,28,28: shape of one sample.")] = None,
    scale: Annotated[Pairs, typer.Option(help="COLUMN=FACTOR, such as 1/255.")] = None,
    no_header: Annotated[bool, typer.Option("--no-header", help="CSV columns are called f0, f1 ...")] = False,
    image_size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH to resize images to.")] = None,
    image_channels: Annotated[int, typer.Option(help="1, 3 or 4.")] = 3,
    no_shuffle: Annotated[bool, typer.Option("--no-shuffle", help="Keep the source's order.")] = False,
) -> None:
    """Turn data into slices and a manifest."""
    from typing import cast, get_args

    from hypha.data import prepare as prepare_dataset
    from hypha.data import survey
    from hypha.data.options import PrepareOptions, SourceKind

    if kind is not None and kind not in get_args(SourceKind):
        raise typer.BadParameter(f"--kind is one of {', '.join(get_args(SourceKind))}")
    if image_channels not in (1, 3, 4):
        raise typer.BadParameter("--image-channels is 1, 3 or 4")
    height_width = _numbers("--image-size", image_size) if image_size else None
    if height_width is not None and len(height_width) != 2:
        raise typer.BadParameter("--image-size is HEIGHTxWIDTH")
    options = PrepareOptions(
        sources=tuple(sources),
        output=output,
        **asdict(plain),
        kind=cast(SourceKind | None, kind),
        columns=_names(column),
        drop=_names(drop),
        fill=_pairs("--fill", fill),
        pad={key: _number("--pad", value) for key, value in _pairs("--pad", pad).items()},
        features={key: tuple(value.split(",")) for key, value in _pairs("--feature", feature).items()},
        rename=_pairs("--rename", rename),
        dtypes=_pairs("--dtype", dtype),
        shapes={key: _numbers("--shape", value) for key, value in _pairs("--shape", shape).items()},
        scales={key: _number("--scale", value) for key, value in _pairs("--scale", scale).items()},
        csv_header=not no_header,
        image_size=(height_width[0], height_width[1]) if height_width is not None else None,
        image_channels=cast(Literal[1, 3, 4], image_channels),
        shuffle=not no_shuffle,
    )
    if dry_run:
        found = survey(options, typer.echo)
        _tell(found.notes, found.summary.lines())
        apart = f", {found.held_out} held out" if found.held_out else ""
        typer.echo(
            f"dry run: {options.dataset_name} would have {found.samples} samples in {found.slices} "
            f"slices{apart}; nothing is written"
        )
        return
    made = prepare_dataset(options, typer.echo)
    _tell(made.notes, made.summary.lines())
    for manifest, directory in ((made.manifest, made.directory), (made.holdout, made.holdout_directory)):
        if manifest is not None:
            size = f"{manifest.samples} samples in {len(manifest.slices)} slices"
            typer.echo(f"{manifest.name}: {size}, in {directory}")


def _tell(notes: tuple[str, ...], summary: list[str]) -> None:
    for note in notes:
        typer.echo(f"note: {note}")
    for line in summary:
        typer.echo(line)


def _names(texts: list[str] | None) -> tuple[str, ...]:
    return tuple(name for text in texts or () for name in text.split(",") if name)


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()

"""``hypha-scheduler``: finds workers for one job, trains its model with them, and exports it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hypha.cli import component as common
from hypha.cli.options import ConfigOption, InitOptions, RunOptions, SetOption, with_options
from hypha.cli.running import run_program, run_service
from hypha.config.tasks import task_of, unknown_task
from hypha.decoding import decode
from hypha.errors import Undecodable

COMPONENT = "scheduler"


def validate(
    config: ConfigOption = None,
    set_: SetOption = None,
    network: Annotated[
        bool, typer.Option("--network", help="Also ask gateways and data nodes; try a batch.")
    ] = False,
) -> None:
    """Check a configuration and the files it names; list all problems, exit 2 if there are any."""
    loaded = common.validate_config(COMPONENT, config, common.settings(COMPONENT, set_))
    if network:
        from hypha.cli.job.checking import check_network

        raise typer.Exit(check_network(loaded))


app = common.make_app(
    COMPONENT, "Finds workers for a job, trains its model with them and exports it.", validates=validate
)

StateDirOption = Annotated[Path | None, typer.Option("--state-dir", help="For state, checkpoints, ledger.")]
SaveToOption = Annotated[
    str | None,
    typer.Option("--save-to", help="For the trained model: a directory, an fsspec URL, hf://<repository>."),
]
RoundsOption = Annotated[int | None, typer.Option("--rounds", help="Update rounds.", min=1)]
BatchOption = Annotated[int | None, typer.Option("--batch-size", help="Samples a batch.", min=1)]
WorkersOption = Annotated[int | None, typer.Option("--workers", help="Training workers.", min=1)]


@app.command()
@with_options
def init(
    options: InitOptions,
    state_dir: StateDirOption = None,
    save_to: SaveToOption = None,
    rounds: RoundsOption = None,
    workers: WorkersOption = None,
    batch_size: BatchOption = None,
    dataset: Annotated[str | None, typer.Option(help="The dataset's name.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Directory with the model's config.json (weights optional).")
    ] = None,
    repository: Annotated[str | None, typer.Option(help="The model on the Hugging Face hub instead.")] = None,
    entrypoint: Annotated[
        str | None, typer.Option(help="A plain PyTorch model instead: package.module:callable.")
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            help="Its task, such as causal-lm; default: as its config.json says, else image-classification, "
            "torch for an entrypoint."
        ),
    ] = None,
) -> None:
    """Write a configuration file with every key, its default and what it means."""
    job = "scheduler.job"
    if sum(one is not None for one in (model, repository, entrypoint)) > 1:
        raise typer.BadParameter("--model, --repository and --entrypoint: give one of them")
    if model_type is not None and (wrong := unknown_task(model_type)):
        raise typer.BadParameter(f"--model-type: {wrong}")
    source: dict[str, str | Path] = {"path": model or Path("model")}
    if repository is not None:
        source = {"repository": repository}
    elif entrypoint is not None:
        source = {"entrypoint": entrypoint}
    given = {
        "state_dir": state_dir,
        f"{job}.model.type": model_type or ("torch" if entrypoint else _task_in(model)),
        **{f"{job}.model.{key}": value for key, value in source.items()},
        f"{job}.dataset.dataset": dataset or "dataset",
        f"{job}.rounds.update_rounds": rounds,
        f"{job}.rounds.avg_samples_between_updates": 1200,
        f"{job}.rounds.batch_size": batch_size or 16,
        f"{job}.resources.num_workers": workers,
        f"{job}.output": Path(save_to) if save_to and "://" not in save_to else save_to or "output",
    }
    fill_in: dict[str, str] = {}
    if model is None and repository is None and entrypoint is None:
        fill_in[f"{job}.model.path"] = "a directory with the model's config.json, or `repository` instead"
    if dataset is None:
        fill_in[f"{job}.dataset.dataset"] = "the name your data node serves the dataset under"
    common.write_config(COMPONENT, options, given, fill_in)


def _task_in(model: Path | None) -> str:
    """The task of the model in that directory, as far as its config.json says."""
    try:
        described = decode(json.loads, ((model or Path("model")) / "config.json").read_bytes())
    except (OSError, Undecodable):
        described = {}
    named = described.get("architectures") if isinstance(described, dict) else None
    return task_of(named) or "image-classification"


@app.command()
@with_options
def run(
    options: RunOptions,
    state_dir: StateDirOption = None,
    save_to: SaveToOption = None,
    rounds: RoundsOption = None,
    workers: WorkersOption = None,
    batch_size: BatchOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; the state of an earlier run is kept aside.")
    ] = False,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Do not check first whether the model goes with the dataset."),
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(help="Append every event and decision to this file (JSON lines)."),
    ] = None,
) -> None:
    """Run the job to its end; SIGINT or SIGTERM stop it, and it resumes when run again."""
    job = "scheduler.job"
    loaded = common.load_to_run(
        COMPONENT,
        options,
        ("--state-dir", "state_dir", state_dir),
        ("--save-to", f"{job}.output", save_to),
        ("--rounds", f"{job}.rounds.update_rounds", rounds),
        ("--batch-size", f"{job}.rounds.batch_size", batch_size),
        ("--workers", f"{job}.resources.num_workers", workers),
        ("--no-check", f"{job}.check", "none" if no_check else None),
    )
    from hypha.cli.job.scheduling import run_scheduler
    from hypha.scheduler.job.ending import finished_job

    if loaded.log_format == "auto" and sys.stdout.isatty():
        # beside the live panel people read it, not machines
        loaded = loaded.model_copy(update={"log_format": "text"})

    async def service() -> None:
        done = None if fresh else await finished_job(loaded.state_dir, loaded.scheduler.job)
        if done is not None:
            print(
                f"{done.name} is done: {done.rounds} rounds, {done.samples} samples; the model is in "
                f"{done.output}. More update_rounds go on from here; --fresh starts anew."
            )
            return
        await run_scheduler(loaded, live=sys.stdout.isatty(), fresh=fresh, journal=journal)

    raise typer.Exit(run_service("hypha-scheduler", loaded, service))


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()

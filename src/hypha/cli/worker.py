"""``hypha-worker``: offers this machine to schedulers and runs their executors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hypha.cli import component as common
from hypha.cli.options import ConfigOption, InitOptions, RunOptions, with_options
from hypha.cli.running import STOP_S, run_program, run_service
from hypha.errors import HyphaError

if TYPE_CHECKING:
    from hypha.config.models import WorkerConfig

COMPONENT = "worker"


def _describe(config: WorkerConfig) -> Iterator[str]:
    """What this machine has, what of it is offered, and by what an executor is held to its lease."""
    from hypha.config.environment import child_environment
    from hypha.messages import Resources
    from hypha.worker.limits.cgroups import usable_cgroups
    from hypha.worker.limits.detecting import detect, lowered
    from hypha.worker.limits.limits import Means, mechanisms
    from hypha.worker.limits.quotas import usable_quotas

    machine = detect(config.work_dir, child_environment())
    configured = Resources(**config.resources.model_dump())
    offered, claims = lowered(configured, machine) if config.detect_resources else (configured, ())
    for name, found in machine.describe().items():
        yield f"resource {name}: {getattr(offered, name):g} offered ({found})"
    quotas = usable_quotas(config.work_dir) if config.work_dir.is_dir() else None
    means = Means(config.limits.enforce, usable_cgroups(), gpus=machine.gpus, quotas=quotas)
    enforced = mechanisms(means, config.cache.max_gb)
    yield from (f"limit {name}: {by}" for name, by in enforced.items())
    for claim in claims:
        yield f"advice: {claim}"


app = common.make_app(
    COMPONENT, "Offers this machine's resources and runs executors under leases.", describe=_describe
)

#: ``drain --now`` leaves so many seconds, and waits so many more for the worker's process
DRAIN_S, STOPPED_S = 30.0, 10.0
#: of memory and disk, what ``init`` offers
OFFERED = 0.8

WorkDirOption = Annotated[Path | None, typer.Option("--work-dir", help="For job directories and the cache.")]


@app.command()
@with_options
def init(
    options: InitOptions,
    work_dir: WorkDirOption = None,
    cpu: Annotated[float | None, typer.Option(help="Cores to offer.", min=0)] = None,
    memory: Annotated[float | None, typer.Option(help="GB of memory to offer.", min=0)] = None,
    gpu: Annotated[float | None, typer.Option(help="GB of GPU memory to offer.", min=0)] = None,
    storage: Annotated[float | None, typer.Option(help="GB of storage to offer.", min=0)] = None,
) -> None:
    """Write a configuration file with every key, its default and what it means; of this machine's resources
    a little is left to others.
    """
    from hypha.config.environment import child_environment
    from hypha.messages import Resources
    from hypha.worker.limits.detecting import detect, lowered

    here = detect(options.output.parent / (work_dir or "work"), child_environment())
    given: dict[str, Any] = {
        "work_dir": work_dir,
        "resources.cpu": here.cpu if cpu is None else cpu,
        "resources.memory": round(OFFERED * here.memory, 1) if memory is None else memory,
        "resources.gpu": round(OFFERED * here.gpu, 1) if gpu is None else gpu,
        "resources.storage": round(OFFERED * here.storage, 1) if storage is None else storage,
    }
    common.write_config(COMPONENT, options, given, {})
    for name, found in here.describe().items():
        typer.echo(f"  found {name}: {found}")
    asked = {name: float(given[f"resources.{name}"] or 0.0) for name in ("cpu", "memory", "gpu", "storage")}
    # it may be for another machine, so what was asked for is written
    for claim in lowered(Resources(**asked), here)[1]:
        typer.echo(f"note: {claim} when a worker starts here")


@app.command()
@with_options
def run(options: RunOptions, work_dir: WorkDirOption = None) -> None:
    """Run until SIGINT or SIGTERM."""
    loaded = common.load_to_run(COMPONENT, options, ("--work-dir", "work_dir", work_dir))
    from hypha.telemetry.running import emit_spans
    from hypha.worker.node import run_worker

    async def service() -> None:
        # not before telemetry has begun
        await run_worker(loaded, emit_spans=emit_spans(), alone=True)

    # a notice of the machine's end leaves more time, and what was trained is handed over in it
    stop_s = STOP_S + (loaded.preemption.notice_s or 0.0)
    raise typer.Exit(run_service("hypha-worker", loaded, service, stop_s))


@app.command()
def drain(
    config: ConfigOption = None,
    work_dir: WorkDirOption = None,
    now: Annotated[
        bool, typer.Option("--now", help="Also hand over what was trained, give leases back, and end it.")
    ] = False,
    within: Annotated[
        float | None,
        typer.Option(help="With --now: seconds; default: preemption.notice_s, else 30.", min=2),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Make offers again.")] = False,
) -> None:
    """Have the worker that runs here make no new offers; what is leased goes on, unless --now."""
    from hypha.worker.control import Call, send_call

    if now and undo:
        raise typer.BadParameter("--now ends the worker, and that cannot be undone")
    if within is not None and not now:
        raise typer.BadParameter("--within goes with --now")
    notice_s: float | None = None
    if work_dir is None:
        loaded = common.load(COMPONENT, config, [])
        work_dir, notice_s = loaded.work_dir, loaded.preemption.notice_s
    if not now:
        answer, _ = send_call(work_dir, Call(what="resume" if undo else "drain"))
    else:
        within_s = within or notice_s or DRAIN_S
        typer.echo(f"the worker hands over what it has trained, for {within_s:g} s at most")
        answer, ended = send_call(work_dir, Call(what="leave", within_s=within_s), within_s + STOPPED_S)
        if ended:
            typer.echo("the worker has ended")
            return
    if answer.refused:
        raise HyphaError(answer.refused)
    typer.echo(f"the worker {answer.state}; it has {answer.leases} leases")
    if now:
        raise HyphaError("the worker has not ended in time; see its log")


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()

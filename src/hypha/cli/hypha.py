"""``hypha``: what concerns a whole network, a whole job or any node: the demo, faults, the doctor, a job's
status, its replay, its time line and its report; who is in the network, where, and who holds which lease.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hypha.cli.job.report import report
from hypha.cli.job.status import status
from hypha.cli.job.timeline import timeline
from hypha.cli.lookups import leases, lookup, peers
from hypha.cli.options import DEFAULT_CONFIG, ConfigOption, with_options
from hypha.cli.running import check_installed, run_program, run_until_signal

app = typer.Typer(
    name="hypha",
    help="Pools ordinary, badly connected machines into one trainer.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_MBIT = 10**6 / 8

SummaryOption = Annotated[
    Path | None, typer.Option("--summary", help="Write a summary as JSON to this file.")
]
DirectoryOption = Annotated[
    Path | None, typer.Option("--dir", help="Work in this directory and keep it, logs and all.")
]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What ``hypha demo`` does, and where."""

    workers: Annotated[
        int, typer.Option(help="Training workers; one also hosts the parameter server.", min=1)
    ] = 3
    rounds: Annotated[int, typer.Option(help="Update rounds.", min=1)] = 10
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the trained model goes.")] = Path(
        "demo/model"
    )
    summary: SummaryOption = None
    directory: DirectoryOption = None
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary directory.")] = False
    open: Annotated[bool, typer.Option("--open", help="Open the job's live page in the browser.")] = False


@app.command()
@with_options
def demo(options: DemoOptions) -> None:
    """Train a real model over a real network on this machine: gateway, data node, workers, scheduler."""
    check_installed("hypha demo", "torch", "sklearn", "transformers", "accelerate")
    from hypha.cli.demo import run_demo

    raise typer.Exit(run_until_signal(lambda: run_demo(options), stop_s=None, hangup=True))


@app.command()
def chaos(
    minutes: Annotated[float, typer.Option(help="How long faults are injected.", min=0.25)] = 10.0,
    workers: Annotated[int, typer.Option(help="Training workers; a spare one comes on top.", min=1)] = 4,
    interval: Annotated[float, typer.Option(help="Seconds between faults, on average.", min=2.0)] = 20.0,
    seed: Annotated[int, typer.Option(help="Decides which fault comes when.")] = 0,
    faults: Annotated[
        str, typer.Option(help="What happens: of kill, stop, cut, slow, corrupt and fill_disk.")
    ] = "kill,stop,cut",
    summary: SummaryOption = None,
    directory: DirectoryOption = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="In memory, under a virtual clock, many schedules of faults.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="With --simulated: how many schedules.", min=1)] = 100,
    processes: Annotated[
        int | None, typer.Option(help="With --simulated: at once. By default one a core.", min=1)
    ] = None,
) -> None:
    """Train on a real network on this machine, undisturbed and then with faults, and compare. With
    --simulated the network is one in memory, and every run is checked: its samples, its leases, its
    checkpoints, and its result against a replay of its ledger.
    """
    if simulated:
        check_installed("hypha chaos --simulated", "torch")
        from hypha.simulation.search import search

        raise typer.Exit(bool(search(seed, seeds, processes or os.cpu_count() or 1, typer.echo)))
    from hypha.errors import JobFailed

    check_installed("hypha chaos", "torch", "sklearn", "transformers", "accelerate")
    from hypha.cli.chaos.run import ChaosOptions, parse_faults, run_chaos

    options = ChaosOptions(minutes * 60, workers, interval, seed, parse_faults(faults), summary, directory)

    async def service() -> None:
        report = await run_chaos(options)
        if report.failure:
            raise JobFailed(report.failure)

    raise typer.Exit(run_until_signal(service, stop_s=None, hangup=True))


@app.command()
def doctor(
    config: ConfigOption = None,
    component: Annotated[
        str | None, typer.Option(help="Whose configuration it is, where its keys do not tell.")
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(help="A scheduler's configuration: would this node serve that job?", dir_okay=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Is this dataset announced and served, and how fast does it come?")
    ] = None,
    peer: Annotated[
        list[str] | None, typer.Option(help="Multiaddr or PeerID of a node to look at, too. May be repeated.")
    ] = None,
    line_mbit: Annotated[
        float | None, typer.Option(help="What the line can carry: are the socket buffers enough?", min=0)
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look at this machine alone.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Look for what keeps a node from working well: the machine, its certificates, the network around it, a
    job. One line a finding, and how to mend it. Exits with 0 when there is none (or notes), 7 with
    warnings, 8 with errors.
    """
    from hypha.access import ROLES
    from hypha.cli.doctor.checks import exit_code_of
    from hypha.cli.doctor.subject import read_subject
    from hypha.cli.doctor.whole import gather, judge, show, show_json
    from hypha.config.job import DatasetRef
    from hypha.config.reading.log_filter import parse_filter
    from hypha.telemetry.logs import configure_logging

    if component is not None and component not in ROLES:
        raise typer.BadParameter(f"--component: one of {', '.join(ROLES)}")
    path = config or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)
    if path is None and (peer or dataset):
        raise typer.BadParameter("--peer and --dataset need the configuration of a node to ask as: --config")
    configure_logging("hypha-doctor", parse_filter("off"), "text")
    subject = read_subject(path, component, job)
    ref = subject.job.dataset if subject.job is not None else None
    if dataset is not None:
        ref = DatasetRef(dataset=dataset)
    if not json_ and sys.stderr.isatty():
        typer.echo("looking around; this takes some seconds", err=True)
    found = []

    async def work() -> int:
        found.append(await gather(subject, peer or (), ref, offline))
        return 0

    code = run_until_signal(work)
    if not found:
        raise typer.Exit(code)
    findings = judge(subject, found[0], None if line_mbit is None else line_mbit * _MBIT)
    if json_:
        show_json(subject, found[0], findings)
    else:
        show(subject, found[0], findings)
    raise typer.Exit(exit_code_of(findings))


@app.command()
def replay(
    job: Annotated[
        Path | None,
        typer.Argument(help="A job's state directory, as of a running job too, or its ledger.json."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The prepared dataset.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="The untrained model's files; none for one built by an entrypoint.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="A model.safetensors to compare the result with.")
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(help="Instead of a job: what a scheduler wrote with --journal; its decisions again."),
    ] = None,
) -> None:
    """Train as the ledger says that a job was trained, and compare theta after each round."""
    if journal is not None:
        if (job, data, model, compare) != (None, None, None, None):
            raise typer.BadParameter("a journal is replayed by itself, without a job", param_hint="--journal")
        from hypha.cli.job.rerun import print_rerun

        raise typer.Exit(print_rerun(journal))
    if job is None:
        raise typer.BadParameter("a job's state directory, or --journal", param_hint="JOB")
    if data is None:
        raise typer.BadParameter("the dataset that the job was trained with", param_hint="--data")
    from hypha.scheduler.durable.ledger import export_ledger, read_ledger

    if job.is_dir():
        # the ledger's database where there is one: it has rounds of which no file was written yet
        job = job / ("job.db" if (job / "job.db").exists() else "ledger.json")
    with tempfile.TemporaryDirectory(prefix="hypha-ledger-") as scratch:
        ledger = Path(scratch) / "ledger.json"
        export_ledger(read_ledger(job), ledger)
        command = [sys.executable, "-m", "hypha.executor.replay", str(ledger), str(data)]
        if model is not None:
            command.append(str(model))
        if compare is not None:
            command += ["--compare", str(compare)]
        code = subprocess.run(command, check=False).returncode
    raise typer.Exit(code if code >= 0 else 128 - code)


for command in (status, timeline, report, peers, lookup, leases):
    app.command()(command)


@app.command()
def version() -> None:
    """Print the version."""
    from hypha import __version__

    typer.echo(f"hypha {__version__}")


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()

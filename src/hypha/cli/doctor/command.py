"""``hypha doctor``: the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hypha.cli.options import DEFAULT_CONFIG, ConfigOption

_MBIT = 10**6 / 8


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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Look for what keeps a node from working well: the machine, its certificates, the network around it, a
    job. One line a finding, and how to mend it. Exits with 0 when there is none (or notes), 7 with
    warnings, 8 with errors.
    """
    from hypha.access import ROLES
    from hypha.cli.doctor import showing
    from hypha.cli.doctor.finding import exit_code_of
    from hypha.cli.doctor.gathering.whole import Subjects, gather
    from hypha.cli.doctor.judging.whole import judge
    from hypha.cli.doctor.subject import read_subject
    from hypha.cli.running import run_until_signal
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
    wanted = Subjects(tuple(peer or ()), ref, offline)
    if not as_json and sys.stderr.isatty():
        typer.echo("looking around; this takes some seconds", err=True)
    found = []

    async def work() -> int:
        found.append(await gather(subject, wanted))
        return 0

    code = run_until_signal(work)
    if not found:
        raise typer.Exit(code)
    findings = judge(subject, found[0], None if line_mbit is None else line_mbit * _MBIT)
    if as_json:
        typer.echo(showing.as_json(subject, found[0], findings))
    else:
        showing.show(subject, found[0], findings)
    raise typer.Exit(exit_code_of(findings))

"""``hypha replay``: a job again, in one process, from its ledger: ``hypha.executor.replay`` does it. Or what
a scheduler decided, from its journal: :mod:`hypha.cli.job.rerun`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer


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
        raise typer.Exit(_rerun(journal))
    if job is None:
        raise typer.BadParameter("a job's state directory, or --journal", param_hint="JOB")
    if data is None:
        raise typer.BadParameter("the dataset that the job was trained with", param_hint="--data")
    from hypha.scheduler.durable.ledger import export_ledger, read_ledger

    with tempfile.TemporaryDirectory(prefix="hypha-ledger-") as scratch:
        ledger = Path(scratch) / "ledger.json"
        export_ledger(read_ledger(_ledger_in(job)), ledger)
        command = [sys.executable, "-m", "hypha.executor.replay", str(ledger), str(data)]
        if model is not None:
            command.append(str(model))
        if compare is not None:
            command += ["--compare", str(compare)]
        code = subprocess.run(command, check=False).returncode
    raise typer.Exit(code if code >= 0 else 128 - code)


def _rerun(journal: Path) -> int:
    """0 when the machines decide as they did."""
    from hypha.cli.job.rerun import rerun

    result = rerun(journal)
    if result.without_beginning:
        print(f"{result.without_beginning} entries are of machines whose beginning is not in {journal}")
    if (found := result.difference) is not None:
        print(f"entry {found.number}: {found.machine} answers {found.event} with other {found.what}")
        print(f"  then: {found.then}")
        print(f"  now:  {found.now}")
        return 1
    print(f"{result.entries} entries of {result.machines} machines: all decide as they did")
    return 0 if result.entries else 1


def _ledger_in(job: Path) -> Path:
    """The ledger's database where there is one: it has rounds of which no file was written yet."""
    if not job.is_dir():
        return job
    database = job / "job.db"
    return database if database.exists() else job / "ledger.json"

"""``hypha replay``: a job again, in one process, from its ledger: ``hypha.executor.replay`` does it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer


def replay(
    job: Annotated[
        Path, typer.Argument(help="A job's state directory, as of a running job too, or its ledger.json.")
    ],
    data: Annotated[Path, typer.Option(help="The prepared dataset.")],
    model: Annotated[
        Path | None, typer.Option(help="The untrained model's files; none for one built by an entrypoint.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="A model.safetensors to compare the result with.")
    ] = None,
) -> None:
    """Train as the ledger says that a job was trained, and compare theta after each round."""
    from hypha.scheduler.ledger import export_ledger, read_ledger

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


def _ledger_in(job: Path) -> Path:
    """The book itself where there is one: it knows of rounds that no file was written of yet."""
    if not job.is_dir():
        return job
    book = job / "job.db"
    return book if book.exists() else job / "ledger.json"

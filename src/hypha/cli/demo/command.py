"""The demo from its first certificate to the trained model's accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    workers: Annotated[
        int, typer.Option(help="Training workers; one also hosts the parameter server.", min=1)
    ] = 3,
    rounds: Annotated[int, typer.Option(help="Update rounds.", min=1)] = 10,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the trained model goes.")] = Path(
        "demo/model"
    ),
    summary: Annotated[Path | None, typer.Option(help="Write a summary as JSON to this file.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Work in this directory and keep it, logs and all.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the temporary directory.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the job's live page in the browser.")] = False,
) -> None:
    """Train a real model over a real network on this machine: gateway, data node, workers, scheduler."""
    from hypha.cli.running import check_installed, run_until_signal

    check_installed("hypha demo", "torch", "sklearn", "transformers", "accelerate")
    from hypha.cli.demo.run import DemoOptions, run_demo

    options = DemoOptions(workers, rounds, output, summary, directory, keep, open_)

    async def service() -> None:
        await run_demo(options)

    raise typer.Exit(run_until_signal(service, stop_s=None, hangup=True))

"""A real local network under a seeded schedule of faults, and what they cost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def chaos(
    minutes: Annotated[float, typer.Option(help="How long faults are injected.", min=0.25)] = 10.0,
    workers: Annotated[int, typer.Option(help="Training workers; a spare one comes on top.", min=1)] = 4,
    interval: Annotated[float, typer.Option(help="Seconds between faults, on average.", min=2.0)] = 20.0,
    seed: Annotated[int, typer.Option(help="Decides which fault comes when.")] = 0,
    faults: Annotated[
        str, typer.Option(help="What happens: of kill, stop, cut, slow, corrupt and fill_disk.")
    ] = "kill,stop,cut",
    summary: Annotated[Path | None, typer.Option(help="Write a summary as JSON to this file.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Work in this directory and keep it, logs and all.")
    ] = None,
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
        raise typer.Exit(_simulate(seed, seeds, processes))
    from hypha.cli.running import check_installed, run_until_signal
    from hypha.errors import JobFailed

    check_installed("hypha chaos", "torch", "sklearn", "transformers", "accelerate")
    from hypha.cli.chaos.run import ChaosOptions, parse_faults, run_chaos

    options = ChaosOptions(minutes * 60, workers, interval, seed, parse_faults(faults), summary, directory)

    async def service() -> None:
        report = await run_chaos(options)
        if report.failure:
            raise JobFailed(report.failure)

    raise typer.Exit(run_until_signal(service, stop_s=None, hangup=True))


def _simulate(first: int, seeds: int, processes: int | None) -> int:
    from hypha.cli.running import check_installed

    check_installed("hypha chaos --simulated", "torch")
    from hypha.simulation.search import search

    return 1 if search(first, seeds, processes or os.cpu_count() or 1, typer.echo) else 0

"""``hypha-scheduler validate --network``: what can be told of a job before anybody is leased, in lines."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import trio
import typer

from hypha.cli.running import run_until_signal
from hypha.config.job import JobConfig
from hypha.config.models import SchedulerConfig
from hypha.config.reading.log_filter import parse_filter
from hypha.errors import ConfigError, NetworkError
from hypha.naming import legible
from hypha.net import Libp2pNode, open_node, options_from
from hypha.scheduler.data.datasets import ServedDataset, find_dataset
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.preflight.checking import Checked, check_job
from hypha.scheduler.preflight.known import described, number
from hypha.scheduler.preflight.trial import open_trial
from hypha.telemetry.logs import configure_logging

#: a dataset that is served is found in a fraction of it, unless its data node is only starting
DATASET_S = 20.0
#: nobody waits for a worker here, so the trial may take longer than at a job's start
TRIAL_S = 90.0


def check_network(config: SchedulerConfig) -> int:
    """Print what is found, and return the exit code. Raises ConfigError with what is certain to fail,
    NetworkError when no gateway can be reached, DatasetNotFound, and HyphaError while the job runs.
    """
    configure_logging("hypha-scheduler", parse_filter("error"), "text")
    job = config.scheduler.job
    if (config.state_dir / job.name / "lock").exists():
        # two nodes with one certificate would be in each other's way
        StateDirectory(config.state_dir, job.name).close()

    return run_until_signal(lambda: _check(config, job))


async def _check(config: SchedulerConfig, job: JobConfig) -> None:
    options = replace(options_from(config, "hypha-scheduler"), listen=(), reserve=False)
    async with open_trial(job.model.type) as trial, open_node(options) as node:
        await _reach_gateways(node, config.gateway_addresses)
        await node.wait_connected()
        wait_s = min(job.dataset.wait_s or DATASET_S, DATASET_S)
        typer.echo(f"looking for the dataset {job.dataset.dataset}, for {wait_s:g} s at most")
        dataset = await find_dataset(node, job.dataset.model_copy(update={"wait_s": wait_s}))
        _show_dataset(dataset)
        run_trial = None if trial is None else partial(trial.run, timeout_s=TRIAL_S)
        checked = await check_job(job, dataset.manifest, run_trial)
    _show_findings(checked)


async def _reach_gateways(node: Libp2pNode, addresses: list[str]) -> None:
    """One line each, in their order. Raises NetworkError when none is there."""
    results: dict[str, str] = {}

    async def reach(address: str) -> None:
        place, _, wanted = address.partition("/p2p/")
        try:
            found = await node.who_is_at(address)
        except NetworkError as exc:
            results[address] = f"NOT reached: {str(exc).removeprefix(f'{place}: ')}"
            return
        if wanted and found != wanted:
            results[address] = f"NOT reached: {found} is there instead; correct the address or its /p2p/ part"
        else:
            results[address] = "reached" if wanted else f"reached: {found}"

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(reach, address)
    for address in addresses:
        typer.echo(f"gateway {address}: {results[address]}")
    if not any(result.startswith("reached") for result in results.values()):
        raise NetworkError("no gateway can be reached: is one running, and are gateway_addresses right?")


def _show_dataset(dataset: ServedDataset) -> None:
    manifest = dataset.manifest
    size = f"{manifest.samples} samples in {len(manifest.slices)} slices"
    typer.echo(f"dataset {dataset.name}: {size}, served by {', '.join(sorted(dataset.providers))}")
    ranges = {one.column: one for one in manifest.ranges}
    for column in manifest.columns:
        found = ranges.get(column.name)
        numbers = "" if found is None else f", {number(found.low)} to {number(found.high)}"
        typer.echo(legible(f"column: {described({column.name: column})}{numbers}"))
    if not ranges:
        typer.echo("note: the manifest does not say which numbers the columns hold; prepare the dataset anew")


def _show_findings(checked: Checked) -> None:
    """Raises ConfigError with the errors."""
    trial = checked.trial
    if trial is not None and trial.outcome == "passed":
        how = "its shapes and types passed" if trial.shapes_only else "a batch passed"
        typer.echo(f"model: {trial.parameters} parameters; {how}")
    for finding in checked.findings:
        if not finding.error:
            typer.echo(f"advice: {finding}")
    if errors := checked.errors:
        raise ConfigError(errors)
    typer.echo("OK: nothing is found that would keep the job from training")

"""The course of ``hypha chaos``: a network, a job, a calm stretch, the disturbed one, a calm one again.

All three are stretches of one job on one network, so that they differ in the faults alone; the faster of
the calm ones is what goodput is measured against. Nodes are started again by a supervisor, as systemd
would; nothing else is done to the job.
"""

from __future__ import annotations

import json
import shutil
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import trio
from rich.console import Console

from hypha.cli.chaos.faults import How
from hypha.cli.chaos.measuring import Accountant, Applied, LedgerFollower, RoundSpan, account
from hypha.cli.chaos.report import ChaosReport, show
from hypha.cli.chaos.striking import Striker, Supervisor, plan
from hypha.cli.local import lab
from hypha.cli.local.children import NetworkFailed
from hypha.cli.local.network import Network, open_network
from hypha.cli.local.workplace import clean_environment, digits_job, open_directory, prepare_digits
from hypha.cli.printing import print_line, write_text
from hypha.errors import ConfigError, Problem

JOB = "chaos"
#: Nobody counts them: the time decides. More than any run has.
_ROUNDS = 1_000_000
#: Six seconds of training. A batch takes as long as on machines of their own: one that is started again on
#: this one must not cost the others their cores.
_SAMPLES_A_WORKER = 960
_BATCH = 16
_STEP_S = 0.1
#: An epoch lasts half a minute, so that what is trained on is not in everybody's cache.
_COPIES = 10
#: A calm stretch lasts a share of the disturbed one, within these bounds; one comes before, one after.
_CALM_SHARE = 0.125
_CALM_S = (15.0, 75.0)
#: Rounds that are not measured: executors, caches and the projection of batch times warm up.
_WARM_ROUNDS = 4
_START_S = 120.0
#: A job that applies no round for so long will not recover by itself.
_STUCK_S = 120.0
#: a scheduler that is asked for its account at the end of a stretch answers by then
_READ_S = 5.0
_DISK_MB = 64

_TRAIN = {"class": "train", "name": "diloco-transformer", "env": {"HYPHA_STEP_S": str(_STEP_S)}}
_AGGREGATE = {"class": "aggregate", "name": "parameter-server"}


@dataclass(frozen=True)
class ChaosOptions:
    seconds: float
    workers: int
    interval_s: float
    seed: int
    hows: tuple[How, ...]
    summary: Path | None
    directory: Path | None


def parse_faults(text: str) -> tuple[How, ...]:
    """``kill,stop`` as a tuple. Raises ConfigError."""
    known: tuple[How, ...] = get_args(How)
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        what = f"{unknown[0]!r} is no fault" if unknown else "no fault at all"
        raise ConfigError([Problem("--faults", f"{what}; there are {', '.join(known)}")])
    return tuple(how for how in known if how in words)


async def run_chaos(options: ChaosOptions) -> ChaosReport:
    """Run it and tell how it went, well or badly; raises HyphaError when it could not be run at all."""
    console = Console()
    hows = options.hows
    rooted: set[How] = {"cut", "slow", "fill_disk"}
    if (why := lab.missing()) is not None and rooted & set(hows):
        out = [how for how in hows if how in rooted]
        hows = tuple(how for how in hows if how not in rooted)
        print_line(console, f"Left out: {', '.join(out)} ({why}).")
        if not hows:
            raise NetworkFailed("no fault is left to inject")
    async with AsyncExitStack() as stack:
        root = stack.enter_context(open_directory("chaos", options.directory))
        star = None
        if {"cut", "slow"} & set(hows):
            star = lab.Star(stack.enter_context(closing(lab.Lab())))
        network = await stack.enter_async_context(open_network(Network, root, clean_environment(root), star))
        report = await _course(console, network, options, hows)
    show(console, report)
    if options.summary is not None:
        write_text(options.summary, json.dumps(report.to_json(), indent=1) + "\n")
    return report


async def _course(
    console: Console, network: Network, options: ChaosOptions, hows: tuple[How, ...]
) -> ChaosReport:
    print_line(console, f"Preparing the data and starting {options.workers + 7} nodes in {network.root}")
    await _start(network, options.workers, "fill_disk" in hows)
    ledger = LedgerFollower(network.root / "state" / JOB / "job.db")
    supervisor, accountant = Supervisor(network), Accountant(network)
    striker = Striker(network, ledger, supervisor, lambda text: print_line(console, text))
    planned = plan(options.seed, options.seconds, options.interval_s, hows)
    low, high = _CALM_S
    calm_s = max(low, min(high, options.seconds * _CALM_SHARE))
    stretches: list[RoundSpan] = []
    stuck = ""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.follow)
        nursery.start_soon(supervisor.run)
        nursery.start_soon(accountant.run)
        try:
            await _warm_up(network, ledger)
            print_line(console, f"Round {ledger.round}; undisturbed for {calm_s:g} s")
            stretches.append(await _stretch(ledger, calm_s))
            print_line(console, f"Round {ledger.round}; {len(planned)} faults in {options.seconds:g} s")
            async with trio.open_nursery() as strikes:
                strikes.start_soon(striker.run, planned)
                stretches.append(await _stretch(ledger, options.seconds))
                # all are healed then
                strikes.cancel_scope.cancel()
            print_line(console, f"Round {ledger.round}; undisturbed for {calm_s:g} s again")
            stretches.append(await _stretch(ledger, calm_s))
            await accountant.caught_up(stretches[1], _READ_S)
        except* NetworkFailed as failed:
            stuck = str(failed.exceptions[0])
        nursery.cancel_scope.cancel()
    return ChaosReport(
        stretches,
        ledger.applied,
        ledger.samples(),
        struck=striker.struck,
        ended=supervisor.ended,
        generation=ledger.generation(),
        stuck=stuck,
        own=account(accountant.readings, stretches[1]) if len(stretches) > 1 else None,
    )


async def _warm_up(network: Network, ledger: LedgerFollower) -> None:
    with trio.move_on_after(_START_S):
        while ledger.round < _WARM_ROUNDS:
            await ledger.next_round(_START_S)
        return
    scheduler = next(one for one in network.group.running if one.name.startswith("scheduler"))
    raise NetworkFailed(f"the job did not start within {_START_S:g} s:\n{scheduler.tail()}")


async def _stretch(ledger: LedgerFollower, seconds: float) -> RoundSpan:
    """From the application of a round to that of the first one after ``seconds``."""
    began, first = ledger.applied[-1].at, ledger.round
    with trio.move_on_at(began + seconds):
        while True:
            await _next(ledger)
    last = await _next(ledger)
    return RoundSpan(began, last.at, first, last.round + 1)


async def _next(ledger: LedgerFollower) -> Applied:
    applied = await ledger.next_round(_STUCK_S)
    if applied is None:
        raise NetworkFailed(
            f"no round was applied for {_STUCK_S:g} s: the job is stuck at round {ledger.round}"
        )
    return applied


async def _start(network: Network, workers: int, small_disks: bool) -> None:
    """Of gateways and data nodes two; a node for the parameter server alone, and a spare for either part."""
    root = network.root
    await network.start_host()
    await prepare_digits(root, network.group, _COPIES)
    names = [f"worker-{number + 1}" for number in range(workers)]
    if small_disks:
        for name in ("state", *(f"work-{name}" for name in (*names, "server", "spare"))):
            network.small_disk(root / name, _DISK_MB)
    planned = {name: network.plan_gateway(name) for name in ("gateway-1", "gateway-2")}
    for number, (name, keys) in enumerate(planned.items()):
        others = [address for at, address in enumerate(network.gateways) if at != number]
        gateway = await network.gateway(name, {**keys, "gateway_addresses": others})
        # one that cannot listen is told now, with the end of its log
        await network.logged_value(gateway, "addresses")
    for name in ("data-1", "data-2"):
        copy = root / f"dataset-{name}"
        await trio.to_thread.run_sync(shutil.copytree, root / "dataset", copy)
        await network.data(name, copy)
    # few slices are kept, so that data nodes matter
    cache = {"max_slices": 4}
    for name in names:
        await network.worker(name, executors=[_TRAIN], cache=cache)
    await network.worker("server", executors=[_AGGREGATE])
    await network.worker("spare", executors=[_TRAIN, _AGGREGATE], cache=cache)
    job = digits_job(
        root,
        workers,
        name=JOB,
        rounds={
            "update_rounds": _ROUNDS,
            "avg_samples_between_updates": workers * _SAMPLES_A_WORKER,
            "batch_size": _BATCH,
            "quorum": 0.5,
            "grace_s": 1.0,
            "deadline_s": 3.0,
        },
        inner_optimizer={"learning_rate": 1e-3},
        resources={"min_workers": max(1, workers // 2)},
        checkpoint={"every_rounds": 1},
    )
    await network.scheduler(job)

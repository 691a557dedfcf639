"""The demo's course: certificates, data, processes, progress, evaluation, the model handed over.

Everything is in one directory, which is removed at the end unless it was asked for; only the model and
the summary are left. Whatever happens, no process is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import trio
from rich.console import Console

from hypha.cli.demo import files
from hypha.cli.demo.browser import open_browser
from hypha.cli.demo.children import GRACE_S, Child, Children, DemoFailed, children
from hypha.cli.demo.showing import Show, show_on
from hypha.cli.demo.workplace import (
    HOST,
    clean_environment,
    open_directory,
    prepare_digits,
    start_host,
    warm_keys,
)
from hypha.config.inherited import child_environment
from hypha.errors import OutputError
from hypha.files.staging import StagedDirectory, write_output
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.worker.processes.keepers import Launch, OwnExecutor
from hypha.worker.processes.process import Supervision, run_executor
from hypha.worker.processes.warm import SharedHost

POLL_S = 0.2
#: A gateway that has not logged its addresses by then never will.
START_S = 30.0

SNIPPET = """\
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification
import torch

model = AutoModelForImageClassification.from_pretrained({model!r})
images = torch.tensor(load_digits().images[:10, None] / 16, dtype=torch.float32)
print(model(pixel_values=images).logits.argmax(dim=-1).tolist())
"""


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command line."""

    workers: int
    rounds: int
    output: Path
    summary: Path | None
    directory: Path | None
    keep: bool
    #: the live page, in the user's browser
    open: bool = False


@dataclass(frozen=True)
class DemoOutcome:
    """How it went."""

    accuracy: float
    held_out: int
    rounds: int
    samples: int


async def run_demo(options: DemoOptions) -> None:
    """Run it; raises HyphaError (DemoFailed with the end of a log) when something fails."""
    began = trio.current_time()
    console = Console()
    _check_output(options.output)
    async with open_directory("demo", options.directory, options.keep) as root:
        place = files.DemoFiles(root)
        async with children(root, clean_environment(place)) as group:
            with show_on(console) as show:
                outcome = await _train(place, group, options, show)
            await trio.to_thread.run_sync(_hand_over, place["model"], options.output)
    wall_s = trio.current_time() - began
    _conclude(console, options, outcome, wall_s)


async def _train(place: files.DemoFiles, group: Children, options: DemoOptions, show: Show) -> DemoOutcome:
    job = files.DemoJob(options.workers, options.rounds)
    # first of all: it imports while everything else is made
    host = await start_host(place.root, group)
    show.stage(f"Making certificates for {options.workers + 3} nodes")
    await trio.to_thread.run_sync(files.make_certificates, place, options.workers)
    await trio.to_thread.run_sync(files.write_gateway, place, files.free_port())
    gateway = await _start(place, group, "gateway", "gateway")
    show.stage("Preparing scikit-learn's digits with `hypha-data prepare`, a fifth held out")
    await trio.to_thread.run_sync(files.write_digits, place)
    await trio.to_thread.run_sync(files.write_model, place)
    address = await _gateway_address(gateway, group)
    await trio.to_thread.run_sync(files.write_leaves, place, address, job, warm_keys(host))
    # nodes may start in any order: the workers need not wait for the data
    for number in range(options.workers):
        await _start(place, group, files.worker_name(number), "worker")
    await prepare_digits(place, group)
    show.stage(f"A data node, {options.workers} workers and the scheduler; their logs are in {place['logs']}")
    await _start(place, group, "data", "data")
    scheduler = await _start(place, group, "scheduler", "scheduler")
    await _follow(scheduler, group, show, options.open)
    await group.stop([child for child in group.running if child.name != HOST])
    show.stage("Evaluating the exported model on held-out digits")
    result = await _evaluate(place, group, host)
    about = json.loads((place["model"] / "hypha.json").read_text())
    return DemoOutcome(result["accuracy"], result["samples"], about["rounds"], about["samples"])


async def _evaluate(place: files.DemoFiles, group: Children, host: Path | None) -> dict[str, Any]:
    """What :mod:`hypha.executor.evaluate` says, in a process that the host has forked, if there is one."""
    module = "hypha.executor.evaluate"
    launch = Launch(
        job_id="evaluate",
        argv=(sys.executable, "-m", module, str(place["model"]), str(place["held-out"])),
        environment=child_environment(group.environment),
        work_dir=place.root,
        own=OwnExecutor(module),
    )
    shared = None if host is None else SharedHost(host)
    ended = await run_executor(launch, trio.Event(), GRACE_S, supervision=Supervision(shared))
    if ended.code:
        raise DemoFailed(f"the evaluation failed with exit code {ended.code}:\n{ended.tail}")
    found: dict[str, Any] = json.loads(ended.tail.splitlines()[-1])
    return found


async def _start(place: files.DemoFiles, group: Children, name: str, program: str) -> Child:
    return await group.start(name, f"hypha.cli.{program}", "run", "--config", str(place.config(name)))


async def _gateway_address(gateway: Child, group: Children) -> str:
    with trio.move_on_after(START_S):
        while True:
            group.check()
            addresses = gateway.look().get("addresses")
            if isinstance(addresses, list) and addresses:
                return str(addresses[0])
            await trio.sleep(POLL_S / 4)
    raise DemoFailed(f"the gateway did not start within {START_S:g} s:\n{gateway.tail()}")


async def _follow(scheduler: Child, group: Children, show: Show, browse: bool) -> None:
    """Show the job's progress and the address of its page until the scheduler is done. Raises DemoFailed when
    it fails.
    """
    told = False
    async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client, trio.open_nursery() as nursery:
        while (code := scheduler.process.poll()) is None:
            group.check(scheduler)
            address = scheduler.look().get("http_address")
            if address is not None:
                if not told:
                    told = True
                    url = f"http://{address}/"
                    show.line(f"The live page of the job: {url}")
                    if browse:
                        nursery.start_soon(open_browser, url, show)
                try:
                    answer = await client.get(f"http://{address}/status")
                    show.job(msgspec.json.decode(answer.content, type=JobSnapshot))
                except httpx.HTTPError:
                    # it is busy, or ending: its exit code tells
                    pass
            await trio.sleep(POLL_S)
        nursery.cancel_scope.cancel()
    if code:
        raise DemoFailed(f"the scheduler ended with exit code {code}:\n{scheduler.tail()}", max(code, 1))


def _check_output(output: Path) -> None:
    """An earlier demo's model is replaced, anything else never."""
    if (
        output.exists()
        and not (output / "hypha.json").exists()
        and (not output.is_dir() or any(output.iterdir()))
    ):
        raise OutputError(f"{output} exists and is no model of an earlier demo; choose another --output")


def _hand_over(model: Path, output: Path) -> None:
    _check_output(output)
    try:
        with StagedDirectory(output) as staged:
            staged.copy_tree(model)
            for path in (staged.path, *staged.path.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
            staged.publish()
    except OSError as exc:
        raise OutputError(f"{output} cannot be written: {exc}") from exc


def _conclude(console: Console, options: DemoOptions, outcome: DemoOutcome, wall_s: float) -> None:
    result = {
        "test_accuracy": outcome.accuracy,
        "rounds": outcome.rounds,
        "samples": outcome.samples,
        "wall_s": round(wall_s, 2),
        "workers": options.workers,
        "model": str(options.output.absolute()),
    }
    if options.summary is not None:
        try:
            write_output(options.summary, json.dumps(result, indent=2) + "\n")
        except OSError as exc:
            raise OutputError(f"{options.summary} cannot be written: {exc.strerror}") from exc
    lines = [
        "",
        f"Accuracy on {outcome.held_out} held-out digits: {outcome.accuracy:.1%}",
        f"{outcome.rounds} rounds, {outcome.samples} samples, {options.workers} workers, {wall_s:.1f} s",
        f"The trained model is in {options.output}. To load it:",
        "",
        *(f"    {line}".rstrip() for line in SNIPPET.format(model=str(options.output)).splitlines()),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

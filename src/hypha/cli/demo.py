"""``hypha demo``: a job from the network's first certificate to the trained model's accuracy.

Everything is in one directory, which is removed at the end unless it was asked for; only the model and
the summary are left. Whatever happens, no process is. In a terminal a live panel follows the job, elsewhere
a line where something has changed.
"""

from __future__ import annotations

import json
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from rich.console import Console

from hypha.cli.job.status import live_view
from hypha.cli.local.children import GRACE_S, Child, NetworkFailed
from hypha.cli.local.network import HOST, NO_ANSWER, Network, open_network
from hypha.cli.local.workplace import DATASET, clean_environment, digits_job, open_directory, prepare_digits
from hypha.cli.printing import print_line, write_text
from hypha.config.environment import child_environment
from hypha.errors import OutputError
from hypha.files.staging import StagedDirectory
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Supervision, run_executor
from hypha.worker.processes.warm import SharedHost

if TYPE_CHECKING:
    from hypha.cli.hypha import DemoOptions

POLL_S = 0.2

SNIPPET = """\
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification
import torch

model = AutoModelForImageClassification.from_pretrained({model!r})
images = torch.tensor(load_digits().images[:10, None] / 16, dtype=torch.float32)
print(model(pixel_values=images).logits.argmax(dim=-1).tolist())
"""


async def run_demo(options: DemoOptions) -> None:
    """Run it; raises HyphaError (NetworkFailed with the end of a log) when something fails."""
    began = trio.current_time()
    console = Console()
    _check_output(options.output)
    with open_directory("demo", options.directory, options.keep) as root:
        async with open_network(Network, root, clean_environment(root)) as network:
            evaluated = await _train(network, options, console)
            about = json.loads((root / "model" / "hypha.json").read_text())
            await trio.to_thread.run_sync(_hand_over, root / "model", options.output)
    result = {
        "test_accuracy": evaluated["accuracy"],
        "rounds": about["rounds"],
        "samples": about["samples"],
        "wall_s": round(trio.current_time() - began, 2),
        "workers": options.workers,
        "model": str(options.output.absolute()),
    }
    if options.summary is not None:
        write_text(options.summary, json.dumps(result, indent=2) + "\n")
    lines = [
        "",
        f"Accuracy on {evaluated['samples']} held-out digits: {evaluated['accuracy']:.1%}",
        "{rounds} rounds, {samples} samples, {workers} workers, {wall_s:.1f} s".format_map(result),
        f"The trained model is in {options.output}. To load it:",
        "",
        *(f"    {line}".rstrip() for line in SNIPPET.format(model=str(options.output)).splitlines()),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


async def _train(network: Network, options: DemoOptions, console: Console) -> dict[str, Any]:
    """What the evaluation of the model says."""
    root, group = network.root, network.group
    workers = [f"worker-{number + 1}" for number in range(options.workers)]
    # first of all: it imports while everything else is made
    await network.start_host()
    print_line(console, f"Making certificates for {options.workers + 3} nodes")
    for name in ("gateway", "data", "scheduler", *workers):
        network.identity(name, "worker" if name in workers else name)
    gateway = await network.gateway()
    # nodes may start in any order: the workers need not wait for the data
    for name in workers:
        await network.worker(name)
    print_line(console, "Preparing scikit-learn's digits with `hypha-data prepare`, a fifth held out")
    await prepare_digits(root, group)
    await network.logged_value(gateway, "addresses")
    nodes = f"A data node, {options.workers} workers and the scheduler"
    print_line(console, f"{nodes}; their logs are in {root / 'logs'}")
    await network.data("data", root / "dataset")
    job = digits_job(
        root,
        options.workers,
        name=DATASET,
        rounds={"update_rounds": options.rounds, "avg_samples_between_updates": 1440, "batch_size": 16},
        inner_optimizer={"learning_rate": 2e-3},
        # a job of ten rounds is over before 0.9 has paid off
        outer_optimizer={"learning_rate": 0.7, "momentum": 0.5},
    )
    await _follow(await network.scheduler(job), network, console, options.open)
    await group.stop([child for child in group.running if child.name != HOST])
    print_line(console, "Evaluating the exported model on held-out digits")
    return await _evaluate(network)


async def _evaluate(network: Network) -> dict[str, Any]:
    """What :mod:`hypha.executor.evaluate` says, in a process that the host has forked, if there is one."""
    module, root, host = "hypha.executor.evaluate", network.root, network.executor_host
    launch = Launch(
        job_id="evaluate",
        argv=(sys.executable, "-m", module, str(root / "model"), str(root / "held-out")),
        environment=child_environment(network.group.environment),
        work_dir=root,
        own=module,
    )
    shared = None if host is None else SharedHost(host)
    ended = await run_executor(launch, trio.Event(), GRACE_S, supervision=Supervision(shared))
    if ended.code:
        raise NetworkFailed(f"the evaluation failed with exit code {ended.code}:\n{ended.tail}")
    found: dict[str, Any] = json.loads(ended.tail.splitlines()[-1])
    return found


async def _follow(scheduler: Child, network: Network, console: Console, browse: bool) -> None:
    """Show progress and the page's address until the scheduler is done. Raises NetworkFailed."""
    url = ""
    with live_view(console) as show:
        async with trio.open_nursery() as nursery:
            while (code := scheduler.process.poll()) is None:
                network.group.check(scheduler)
                if (address := scheduler.look().get("http_address")) is not None:
                    if not url:
                        url = f"http://{address}/"
                        print_line(console, f"The live page of the job: {url}")
                        if browse:
                            nursery.start_soon(open_browser, url, console)
                    # it is busy, or ending: its exit code tells
                    with suppress(*NO_ANSWER):
                        show(await network.status(scheduler))
                await trio.sleep(POLL_S)
            nursery.cancel_scope.cancel()
    if code:
        raise NetworkFailed(f"the scheduler ended with exit code {code}:\n{scheduler.tail()}", max(code, 1))


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


async def open_browser(url: str, console: Console) -> None:
    """Open ``url``; what prevents that is printed, and nothing worse comes of it."""

    def opens() -> bool:
        browser = webbrowser.get()
        text = isinstance(browser, webbrowser.GenericBrowser)
        if text and not isinstance(browser, webbrowser.BackgroundBrowser):
            return False
        return browser.open(url)

    try:
        opened = await trio.to_thread.run_sync(opens, abandon_on_cancel=True)
    except (webbrowser.Error, OSError):
        opened = False
    if not opened:
        print_line(console, f"No browser with a window was found here; open {url} yourself.")

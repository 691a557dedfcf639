"""A whole Hypha network of real processes for tests: each node runs ``python -m hypha.cli.<program>``.

Use it through the fixture ``system`` of ``tests/system/conftest.py``::

    async def test_something(system):
        await system.gateway()
        await system.data("data", dataset)
        await system.worker("worker-1")
        scheduler = await system.scheduler(digits_job(...))
        assert await system.ended(scheduler) == 0

A network takes longer to start than most jobs take. The tests of a module share one where they can: see
:func:`keep_system`. Each of them then has a job, and a scheduler, with a name of its own.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio
from safetensors.torch import load_file
from tests.support.host import run_environment, shared_host, shared_node_host

from hypha.cli.chaos.faults import again
from hypha.cli.local.children import Child, Children, NetworkFailed
from hypha.cli.local.lab import Star
from hypha.cli.local.network import JOB_S, LOOK_S, START_S, Network, base, open_network
from hypha.cli.local.workplace import MODEL
from hypha.data import PrepareOptions, prepare
from hypha.executor.replay import largest_difference, replay
from hypha.messages import LedgerFile
from hypha.scheduler.durable.ledger import read_ledger

#: a ``[scheduler.job.model]`` that executors build without transformers
PLAIN: dict[str, Any] = {"type": "torch", "entrypoint": "tests.support.plain:Digits"}
#: the same for jobs of :func:`paced` executors: a tenth of the work a step, also of their replays
SMALL: dict[str, Any] = {"type": "torch", "entrypoint": "tests.support.plain:Small"}
#: and without batch norm
UNNORMED: dict[str, Any] = {"type": "torch", "entrypoint": "tests.support.plain:Unnormed"}


class System(Network):
    """Starts nodes in ``root``, as any :class:`~hypha.cli.local.network.Network`; reads what a job left."""

    async def worker(self, name: str, **keys: Any) -> Child:
        """As any network's, and the models ``PLAIN``, ``SMALL`` and ``UNNORMED`` are allowed."""
        models = [one["entrypoint"] for one in (PLAIN, SMALL, UNNORMED)]
        allow = {"entrypoints": models, **keys.pop("allow", {})}
        return await super().worker(name, allow=allow, **keys)

    async def logged(self, child: Child, text: str, timeout_s: float = START_S) -> str:
        """The first log line of ``child`` that holds ``text``, as soon as there is one."""
        with trio.move_on_after(timeout_s):
            while True:
                lines = child.log.read_text(errors="replace").splitlines()
                found = next((one for one in lines if text in one), None)
                if found is not None:
                    return found
                await trio.sleep(LOOK_S)
        raise NetworkFailed(f"{child.name} has not logged {text!r} in {timeout_s:g} s:\n{child.tail()}")

    async def ended(self, child: Child, timeout_s: float = JOB_S) -> int:
        """Its exit code, once it has ended by itself."""
        with trio.move_on_after(timeout_s):
            return await child.process.wait()
        others = "\n".join(f"{one.name}:\n{one.tail()}" for one in self.group.running)
        raise NetworkFailed(f"{child.name} did not end within {timeout_s:g} s\n{others}")

    async def stop_job(self, scheduler: Child) -> None:
        """SIGTERM: what was applied is in a checkpoint, and the job could go on from there."""
        scheduler.process.terminate()
        assert await self.ended(scheduler) == 128 + signal.SIGTERM, scheduler.tail()

    async def job(self, job: dict[str, Any], **keys: Any) -> Child:
        """The scheduler of one of several jobs in this network: ``<name>-scheduler``, whose model goes to
        ``<root>/<name>``.
        """
        name = job["name"]
        made = {"output": str(self.root / name), **job}
        return await self.scheduler(made, name=f"{name}-scheduler", **keys)

    async def settle(self) -> None:
        """Make it ready for the next test: no fault is left, no job runs, and nodes that were killed have
        been started again.
        """
        self.heal()
        running = self.group.running
        await self.group.stop([one for one in running if self.roles.get(base(one.name)) == "scheduler"])
        newest = {base(one.name): one for one in running}
        for name, child in newest.items():
            if child.process.poll() is not None:
                await self.group.stop([child])
                await again(self, child, self.roles[name])

    def ledger(self, job: str) -> tuple[Path, LedgerFile]:
        """The ledger of a job that has finished or was stopped."""
        path = self.root / "state" / job / "ledger.json"
        return path, read_ledger(path if path.exists() else path.with_name("job.db"))

    async def replay(self, job: str, dataset: Path, model: Path | None, output: str = "model") -> float:
        """max |delta theta| between a one-process replay of the ledger and the model in ``<root>/<output>``,
        or, of a job that was stopped, its last checkpoint; ``model`` are the files of an untrained one.
        """
        path, ledger = self.ledger(job)
        result = self.root / output / "model.safetensors"
        if not path.exists():
            rounds = sum(not entry.discarded for entry in ledger.rounds)
            result = path.with_name("checkpoints") / f"round-{rounds}" / "theta.safetensors"

        def difference() -> float:
            return largest_difference(replay(ledger, dataset, model).theta, load_file(result))

        return await trio.to_thread.run_sync(difference)


@asynccontextmanager
async def open_system(root: Path, star: Star | None = None) -> AsyncIterator[System]:
    """A system in ``root`` whose processes are all gone when the block ends; in a star its nodes can be cut
    off and slowed down.
    """
    async with open_network(System, root, run_environment(), star, shared_node_host()) as system:
        system.executor_host = shared_host()
        yield system


@contextmanager
def keep_system(root: Path, star: Star | None = None) -> Iterator[System]:
    """A system for many tests: processes outlive the run of trio that started them, nothing else does. All
    are gone when the block ends, which checks that.
    """
    system = System(root, Children(root, run_environment(), shared_node_host()), star)
    system.executor_host = shared_host()

    async def close() -> None:
        system.heal()
        await system.group.stop()

    try:
        yield system
    finally:
        try:
            trio.run(close)
        finally:
            system.unmount()
    assert leftovers(root) == []


def digits_dataset(root: Path, name: str = "digits", rows: Sequence[int] | None = None) -> Path:
    """scikit-learn's digits as a prepared dataset of 60-sample slices; ``rows`` in that order."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.arange(len(digits.images)) if rows is None else np.asarray(rows)
    raw = root / f"raw-{name}"
    raw.mkdir()
    np.save(raw / "pixel_values.npy", (digits.images[chosen, None] / 16.0).astype(np.float32))
    np.save(raw / "labels.npy", digits.target[chosen].astype(np.int64))
    output = root / f"dataset-{name}"
    prepare(PrepareOptions((raw,), output, name=name, slice_samples=60, shuffle=rows is None))
    return output


def digits_model(root: Path, **changes: Any) -> Path:
    """A directory with the demo's config.json."""
    directory = root / "untrained"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**MODEL, **changes}))
    return directory


def digits_job(model: Path | None, workers: int, rounds: int, **changes: Any) -> dict[str, Any]:
    """A ``[scheduler.job]`` that trains on ``digits`` the model in that directory, or ``PLAIN``."""
    needs = {"cpu": 1, "memory": 2, "storage": 0, "gpu": 0}
    return {
        "name": "job",
        "model": PLAIN if model is None else {"type": "image-classification", "path": str(model)},
        "dataset": {"dataset": "digits"},
        "rounds": {"update_rounds": rounds, "avg_samples_between_updates": 480, "batch_size": 16},
        "inner_optimizer": {"learning_rate": 2e-3},
        "resources": {"num_workers": workers, "worker": needs, "parameter_server": needs},
        **changes,
    }


def paced(step_s: float) -> dict[str, Any]:
    """A training executor whose batches take at least ``step_s``: rounds last as long on a fast and idle
    machine as a test needs them to, and leave the cores to others.
    """
    return {"class": "train", "name": "diloco-transformer", "env": {"HYPHA_STEP_S": str(step_s)}}


def leftovers(root: Path) -> list[str]:
    """Command lines of live processes that mention ``root``: what should be gone."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(root) in line and " ps " not in line]

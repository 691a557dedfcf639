"""A data node: load its datasets, announce them for as long as it runs, hand out slices (:mod:`.served`).

Nothing that a peer asks can end it: an unknown dataset or slice is refused. A slice whose content is not
what the manifest says is never sent; it is read through before it is first served, and again whenever the
file has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path

import trio

from hypha.backoff import Backoff
from hypha.config.models import DataConfig, DatasetConfig
from hypha.data.manifest import Dataset, load_dataset_directory, require_readable, slice_problem
from hypha.data.serving.served import KIND, ServedDatasets
from hypha.errors import ConfigError, DataError, NetworkError, Problem
from hypha.files.disks import lock
from hypha.messages import DescribeDataset, ListFiles, PeerRef
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.runtime import chance, in_thread, is_simulated
from hypha.telemetry import health_of, serve_http
from hypha.telemetry.instruments import STREAMS
from hypha.telemetry.resources import watch_disks

logger = logging.getLogger(__name__)

#: Pauses between attempts to announce that failed.
ANNOUNCE_RETRY_MIN_S = 0.5
ANNOUNCE_RETRY_MAX_S = 30.0
#: Of these pauses, and of those between two announcements.
ANNOUNCE_JITTER = (0.75, 1.0)
#: How long a start waits for a dataset that is being replaced: renaming takes a moment, a busy disk longer.
LOCK_TIMEOUT_S = 30.0
LOCK_RETRY_S = 0.05


async def run_data(
    config: DataConfig, *, task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run until cancelled; started with the node's PeerID and addresses, once it answers requests.

    Raises ConfigError with all problems of all datasets, or of the identity and addresses.
    """
    node_options = options_from(config, "hypha-data")
    with contextlib.ExitStack() as locks:
        datasets = await load_datasets(config, locks)
        directories = [dataset.directory for dataset in datasets]
        async with open_node(node_options) as node, watch_disks({"datasets": directories}):
            await serve(config, datasets, node, task_status=task_status)


async def serve(
    config: DataConfig,
    datasets: list[Dataset],
    node: Node,
    *,
    task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a data node through ``node``, until cancelled."""
    limits = [frozenset(entry.organizations) for entry in config.datasets]
    served = ServedDatasets(
        datasets,
        node.organization_of,
        {dataset.name: wanted for dataset, wanted in zip(datasets, limits, strict=False) if wanted},
    )
    with contextlib.ExitStack() as gauges:
        if not is_simulated():
            gauges.enter_context(STREAMS.watch(lambda: float(served.active)))
        async with trio.open_nursery() as nursery:
            node.answer(DescribeDataset, served.describe)
            node.answer(ListFiles, served.list_files)
            node.transfers.serve(KIND, served.provide, served.served)
            node.health_details.append(served.health_details)
            if config.http_address is not None:
                await nursery.start(serve_http, config.http_address, lambda: health_of(node))
            task_status.started(node.ref())
            await node.wait_connected()
            for dataset in datasets:
                nursery.start_soon(announce, node, dataset, config.announce_interval_s)


async def load_datasets(config: DataConfig, locks: contextlib.ExitStack | None = None) -> list[Dataset]:
    """All datasets of ``config``, by its order. Raises ConfigError with all their problems.

    Until ``locks`` is closed, ``prepare --force`` on this machine replaces none of them.
    """
    entries = [(f"datasets[{index}]", entry) for index, entry in enumerate(config.datasets)]
    if config.dataset_path is not None:
        entries.append(("dataset_path", DatasetConfig(path=config.dataset_path)))
    if not entries:
        raise ConfigError(
            [Problem("datasets", "there is no dataset to serve; set dataset_path or add [[datasets]]")]
        )
    found: list[Dataset] = []
    problems: list[Problem] = []
    if locks is not None:
        # before anything is read: that may take long, and it must be of one dataset
        for key, entry in list(entries):
            try:
                await lock_for_serving(entry.path, locks)
            except DataError as exc:
                problems.append(Problem(key, str(exc)))
                entries.remove((key, entry))
    for key, entry in entries:
        try:
            # abandoned when cancelled: reading 100 GB must not hold up a stop; nothing is half-written
            dataset = await in_thread(
                load_dataset_directory, entry.path, entry.name, logger.info, abandon_on_cancel=True
            )
            if any(dataset.name == other.name for other in found):
                problems.append(
                    Problem(key, f"two datasets are called {dataset.name!r}; give one of them another `name`")
                )
            found.append(dataset)
            if config.verify_at_start:
                for path, part in zip(dataset.paths, dataset.manifest.slices, strict=True):
                    logger.info("Verifying %s.", path)
                    wrong = await in_thread(
                        slice_problem, path, part, dataset.manifest, abandon_on_cancel=True
                    )
                    if wrong is not None:
                        problems.append(Problem(key, f"{path}: {wrong}"))
        except DataError as exc:
            problems += [Problem(key, line) for line in str(exc).splitlines()]
    if problems:
        raise ConfigError(problems)
    return found


async def lock_for_serving(directory: Path, locks: contextlib.ExitStack) -> None:
    """Share the lock on ``directory`` until ``locks`` is closed, waiting at most ``LOCK_TIMEOUT_S`` seconds
    for a run that is replacing it. Raises DataError.
    """
    deadline = trio.current_time() + LOCK_TIMEOUT_S
    waiting = False
    while True:
        try:
            handle = await in_thread(_share_lock, directory)
        except FileNotFoundError:
            # it went away between two looks at it; the next one tells
            handle = None
        except OSError as exc:
            logger.warning(
                "%s cannot be locked (%s): do not prepare another dataset there while this node runs.",
                directory,
                exc.strerror,
            )
            return
        if handle is not None:
            locks.callback(os.close, handle)
            return
        if trio.current_time() >= deadline:
            raise DataError(
                f"{directory} is locked by another process, which has not ended replacing it within "
                f"{LOCK_TIMEOUT_S:g} s; start this data node again when that `hypha-data prepare` is done"
            )
        if not waiting:
            logger.info("Waiting for %s, which is being replaced.", directory)
            waiting = True
        await trio.sleep(LOCK_RETRY_S)


def _share_lock(directory: Path) -> int | None:
    require_readable(directory)
    return lock(directory, fcntl.LOCK_SH)


async def announce(node: Node, dataset: Dataset, interval_s: float) -> None:
    """Announce for ever: at once, again after ``interval_s`` or a change of gateway, sooner on failure."""
    backoff = Backoff(ANNOUNCE_RETRY_MIN_S, ANNOUNCE_RETRY_MAX_S, jitter=ANNOUNCE_JITTER)
    told = False
    while True:
        seen = node.gateway_changed.count
        try:
            gateways = await node.provide(dataset.name)
        except NetworkError as exc:
            logger.warning("Announcing %s failed: %s.", dataset.name, exc, extra={"dataset": dataset.name})
            gateways = 0
        if gateways:
            level = logging.DEBUG if told else logging.INFO
            logger.log(
                level,
                "Serving %s: %d samples in %d slices, announced at %d gateways.",
                dataset.name,
                dataset.manifest.samples,
                len(dataset.manifest.slices),
                gateways,
                extra={"dataset": dataset.name, "manifest_hash": dataset.manifest_hash},
            )
            backoff.reset()
            wait_s, told = interval_s * chance().uniform(*ANNOUNCE_JITTER), True
        else:
            wait_s = backoff.next_s()
            logger.warning(
                "No gateway took the announcement of %s; trying again in %.1f s.", dataset.name, wait_s
            )
        with trio.move_on_after(wait_s):
            await node.gateway_changed.wait(seen)

"""A data node: load its datasets, announce them for as long as it runs, hand out slices.

Nothing that a peer asks can end it: an unknown dataset or slice is refused. A slice whose content is not
what the manifest says is never sent; it is read through before it is first served, and again whenever the
file has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from hypha import __version__
from hypha.backoff import Backoff
from hypha.config.models import DataConfig, DatasetConfig
from hypha.data.manifest import (
    Dataset,
    load_dataset_directory,
    read_manifest,
    require_readable,
)
from hypha.data.serving.served import ServedSlices
from hypha.data.verify import slice_problem
from hypha.errors import ConfigError, DataError, NetworkError, Problem, Refused
from hypha.features import features_of
from hypha.files.disks import lock
from hypha.messages import (
    DatasetDescription,
    DescribeDataset,
    FileList,
    ListFiles,
    PeerRef,
    PullFile,
    TransferMeta,
)
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.rules.manifests import manifest_hash
from hypha.runtime import chance, in_thread, is_simulated
from hypha.telemetry import health_of, serve_http
from hypha.telemetry.instruments import STREAMS
from hypha.telemetry.resources import watch_disks

logger = logging.getLogger(__name__)

KIND = "slice"
#: Pauses between attempts to announce that failed.
ANNOUNCE_RETRY_MIN_S = 0.5
ANNOUNCE_RETRY_MAX_S = 30.0
#: Of these pauses, and of those between two announcements.
ANNOUNCE_JITTER = (0.75, 1.0)
#: Slices read through at once; more would only make the disk seek.
MAX_CHECKS = 2
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
    with contextlib.ExitStack() as gauges:
        async with trio.open_nursery() as nursery:
            await _serve(config, datasets, node, nursery, gauges, task_status)


async def _serve(
    config: DataConfig,
    datasets: list[Dataset],
    node: Node,
    nursery: trio.Nursery,
    gauges: contextlib.ExitStack,
    task_status: trio.TaskStatus[PeerRef],
) -> None:
    limits = [frozenset(entry.organizations) for entry in config.datasets]
    shelf = Shelf(
        datasets,
        node.organization_of,
        {dataset.name: wanted for dataset, wanted in zip(datasets, limits, strict=False) if wanted},
    )
    node.answer(DescribeDataset, shelf.describe)
    node.answer(ListFiles, shelf.list_files)
    slices = ServedSlices(shelf.provide, frozenset(dataset.name for dataset in datasets))
    node.transfers.serve(KIND, slices.provide, slices.served)
    if not is_simulated():
        gauges.enter_context(STREAMS.watch(lambda: float(slices.active)))
    node.health_details.append(shelf.health_details)
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
    unusable = set()
    if locks is not None:
        # before anything is read: that may take long, and it must be of one dataset
        for key, entry in entries:
            try:
                await lock_for_serving(entry.path, locks)
            except DataError as exc:
                unusable.add(key)
                problems.append(Problem(key, str(exc)))
    for key, entry in entries:
        if key in unusable:
            continue
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
                problems += await _verified(key, dataset)
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


async def _verified(key: str, dataset: Dataset) -> list[Problem]:
    problems = []
    for path, part in zip(dataset.paths, dataset.manifest.slices, strict=True):
        logger.info("Verifying %s.", path)
        wrong = await in_thread(slice_problem, path, part, dataset.manifest, abandon_on_cancel=True)
        if wrong is not None:
            problems.append(Problem(key, f"{path}: {wrong}"))
    return problems


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


class Shelf:
    """The datasets, and what peers may ask of them. ``organization_of`` a connected peer counts where
    ``limits`` has organisations for a dataset, by its name: others are refused.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        organization_of: Callable[[str], str],
        limits: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        self._datasets = {dataset.name: dataset for dataset in datasets}
        self._organization_of = organization_of
        self._limits = limits or {}
        self._checked = {dataset.name: SliceChecks(dataset) for dataset in datasets}
        self._limit = trio.CapacityLimiter(MAX_CHECKS)

    def health_details(self) -> dict[str, str]:
        """What the node's health reports of the datasets."""
        return {
            f"dataset {name}": f"{len(dataset.manifest.slices)} slices, {dataset.manifest.samples} samples, "
            f"{self._checked[name].corrupt} found corrupt"
            for name, dataset in self._datasets.items()
        }

    async def describe(self, caller: str, request: DescribeDataset) -> DatasetDescription:
        """The manifest of a dataset. Refused when it is not here."""
        dataset = self._named(request.dataset, caller)
        return DatasetDescription(
            manifest=dataset.manifest,
            manifest_hash=dataset.manifest_hash,
            version=__version__,
            features=features_of("hypha-data"),
        )

    async def list_files(self, caller: str, request: ListFiles) -> FileList:
        """The slices of the dataset ``name``, as :meth:`provide` would give them."""
        if request.kind != KIND:
            raise Refused("not-found", f"a data node has files of kind {KIND!r} only, not {request.kind!r}")
        dataset = self._named(request.name, caller)
        return FileList(
            files=tuple(slice_meta(dataset, index) for index in range(len(dataset.manifest.slices)))
        )

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        """The file of slice ``<dataset>/<index>``, known to be whole. Raises Refused."""
        name, _, number = request.name.rpartition("/")
        dataset = self._named(name, caller)
        count = len(dataset.manifest.slices)
        # int() would take "-1", "1_0" and digits of other scripts
        if not (number.isascii() and number.isdigit() and len(number) <= 9) or int(number) >= count:
            raise Refused("not-found", f"dataset {name} has no slice {number!r}; they are 0 to {count - 1}")
        index = int(number)
        await self._checked[name].require_whole(index, self._limit)
        return dataset.paths[index], slice_meta(dataset, index)

    def _named(self, name: str, caller: str) -> Dataset:
        dataset = self._datasets.get(name)
        if dataset is None:
            raise Refused("not-found", f"dataset {name!r} is not served here")
        wanted = self._limits.get(name)
        if wanted is not None and (organization := self._organization_of(caller)) not in wanted:
            raise Refused(
                "not-allowed",
                f"dataset {name!r} is limited to some organisations, and {organization!r}, which vouches for "
                "your certificate, is none of them; ask its owner (organizations of [[datasets]])",
            )
        return dataset


def slice_meta(dataset: Dataset, index: int) -> TransferMeta:
    """What a transfer of that slice says."""
    part = dataset.manifest.slices[index]
    return TransferMeta(
        kind=KIND, name=f"{dataset.name}/{index}", size=part.size, blake3=part.blake3, samples=part.samples
    )


def found_wrong(dataset: Dataset, index: int) -> str | None:
    """What is wrong with a slice, all of which is read, and what to do about it."""
    problem = slice_problem(dataset.paths[index], dataset.manifest.slices[index], dataset.manifest)
    if problem is None:
        return None
    try:
        replaced = manifest_hash(read_manifest(dataset.directory)) != dataset.manifest_hash
    except DataError:
        replaced = False
    if replaced:
        return "another dataset was put in its place; start the data node again to serve that one"
    return problem


#: what tells that a file was not touched: inode, size, time of change
Signature = tuple[int, int, int]


class SliceChecks:
    """Which slices of a dataset have been read through, and what was found.

    A verdict holds for as long as the file is not touched, a bad one too: asking for a corrupt slice again
    and again costs no reading.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._paths = dataset.paths
        self._verdicts: dict[int, tuple[Signature, str | None]] = {}
        self._locks: dict[int, trio.Lock] = {}

    @property
    def corrupt(self) -> int:
        """How many slices were found to be wrong."""
        return sum(problem is not None for _, problem in self._verdicts.values())

    async def require_whole(self, index: int, limit: trio.CapacityLimiter) -> None:
        """Return when the slice is known to be whole. Raises Refused, ``invalid`` or ``not-found``."""
        # many workers may want one slice at once; it is read through for the first of them
        async with self._locks.setdefault(index, trio.Lock()):
            problem = await self._problem(index, limit)
        if problem is not None:
            name = f"{self._dataset.name}/{index}"
            raise Refused(
                "invalid", f"slice {name} is corrupt here ({problem}); another provider may have it"
            )

    async def _problem(self, index: int, limit: trio.CapacityLimiter) -> str | None:
        path = self._paths[index]
        before = signature(path)
        known = self._verdicts.get(index)
        if known is not None and known[0] == before:
            return known[1]
        problem = await in_thread(found_wrong, self._dataset, index, limiter=limit, abandon_on_cancel=True)
        if problem is not None:
            logger.error(
                "Slice %s is not served: %s: %s.",
                f"{self._dataset.name}/{index}",
                path,
                problem,
                extra={"dataset": self._dataset.name, "slice": index},
            )
        elif known is not None:
            logger.warning(
                "Slice file %s was touched; it is whole.", path, extra={"dataset": self._dataset.name}
            )
        self._verdicts[index] = (before, problem)
        return problem


def signature(path: Path) -> Signature:
    """Of a file as it is now; all zero when it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)

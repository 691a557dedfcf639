"""What peers may ask of the datasets that are served, and what a data node shows of it: a span, a count,
bytes and a duration of each slice.

A slice is being served from the request for it until its receiver has acknowledged it, or it was given up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio
from opentelemetry.trace import Span

from hypha import __version__
from hypha.data.manifest import Dataset, read_manifest, slice_problem
from hypha.errors import DataError, Refused
from hypha.features import features_of
from hypha.messages import DatasetDescription, DescribeDataset, FileList, ListFiles, PullFile, TransferMeta
from hypha.rules.manifests import manifest_hash
from hypha.runtime import in_thread
from hypha.telemetry.instruments import SERVE_DURATION, SERVED_BYTES, SLICE_REQUESTS
from hypha.telemetry.metrics import OTHER
from hypha.tracing import Attribute, failed, start_span
from hypha.tracing.operations import SERVE_SLICE

logger = logging.getLogger("hypha.data")

KIND = "slice"
#: Slices read through at once; more would only make the disk seek.
MAX_CHECKS = 2


@dataclass(frozen=True)
class _Serving:
    span: Span
    dataset: str
    size: int
    began: float


class ServedDatasets:
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
        #: by who pulls, and the token of its request
        self._serving: dict[tuple[str, str], _Serving] = {}

    @property
    def active(self) -> int:
        """Slices that are being served."""
        return len(self._serving)

    def health_details(self) -> dict[str, str]:
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
        """The file of slice ``<dataset>/<index>``, known to be whole, in the span of the request for it.
        Raises Refused.
        """
        began = trio.current_time()
        name, _, number = request.name.rpartition("/")
        # int() would take "-1", "1_0" and digits of other scripts
        index = int(number) if number.isascii() and number.isdigit() and len(number) <= 9 else None
        attributes: dict[str, Attribute] = {"hypha.peer": caller, "hypha.dataset": name}
        if index is not None:
            attributes["hypha.slice"] = index
        span = start_span(SERVE_SLICE, attributes)
        try:
            dataset = self._named(name, caller)
            count = len(dataset.manifest.slices)
            if index is None or index >= count:
                raise Refused(
                    "not-found", f"dataset {name} has no slice {number!r}; they are 0 to {count - 1}"
                )
            await self._checked[name].require_whole(index, self._limit)
        except BaseException as exc:
            if isinstance(exc, Refused):
                SLICE_REQUESTS.add(dataset=name if name in self._datasets else OTHER, status="failure")
                failed(span, str(exc))
            span.end()
            raise
        meta = slice_meta(dataset, index)
        span.set_attribute("hypha.transfer.bytes", meta.size)
        self._serving[caller, request.token] = _Serving(span, name, meta.size, began)
        return dataset.paths[index], meta

    def served(self, caller: str, request: PullFile, error: Exception | None) -> None:
        """It is over: the receiver has the slice, unless there is an ``error``."""
        serving = self._serving.pop((caller, request.token), None)
        if serving is None:
            return
        SLICE_REQUESTS.add(dataset=serving.dataset, status="success" if error is None else "failure")
        lasted_s = trio.current_time() - serving.began
        logger.debug(
            "Slice %s was %s within %.3f s: %d bytes.",
            request.name,
            "served" if error is None else "not served",
            lasted_s,
            serving.size,
            extra={"peer_id": caller, "dataset": serving.dataset, "job_id": request.job_id},
        )
        if error is None:
            SERVED_BYTES.add(serving.size, dataset=serving.dataset)
            SERVE_DURATION.record(lasted_s, dataset=serving.dataset)
        else:
            failed(serving.span, str(error))
        serving.span.end()

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
        return sum(problem is not None for _, problem in self._verdicts.values())

    async def require_whole(self, index: int, limit: trio.CapacityLimiter) -> None:
        """Return when the slice is known to be whole. Raises Refused, ``invalid`` or ``not-found``."""
        path, name = self._paths[index], f"{self._dataset.name}/{index}"
        fields = {"dataset": self._dataset.name, "slice": index}
        # many workers may want one slice at once; it is read through for the first of them
        async with self._locks.setdefault(index, trio.Lock()):
            before, known = signature(path), self._verdicts.get(index)
            if known is not None and known[0] == before:
                problem = known[1]
            else:
                problem = await in_thread(
                    found_wrong, self._dataset, index, limiter=limit, abandon_on_cancel=True
                )
                self._verdicts[index] = (before, problem)
                if problem is not None:
                    logger.error("Slice %s is not served: %s: %s.", name, path, problem, extra=fields)
                elif known is not None:
                    logger.warning("Slice file %s was touched; it is whole.", path, extra=fields)
        if problem is not None:
            raise Refused(
                "invalid", f"slice {name} is corrupt here ({problem}); another provider may have it"
            )


def signature(path: Path) -> Signature:
    """Of a file as it is now; all zero when it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)

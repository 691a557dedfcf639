"""The slices of a training job: asked for at the worker, read, preprocessed, put in order."""

from __future__ import annotations

from hypha.errors import DataError
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.inner.slices_reader import Slice, read_columns, slice_order
from hypha.executor.models.preprocessing import Preprocessor
from hypha.messages import SchedulerData, TrainJob


class JobSlices:
    """``fetching``: the worker has been asked for one, and has not answered yet."""

    def __init__(self, bridge: BridgeClient, job: TrainJob, preprocess: Preprocessor | None) -> None:
        self._bridge = bridge
        self._job = job
        self._preprocess = preprocess
        self.fetching = False

    def next(self) -> Slice:
        """Fetch, read, preprocess; blocks, in the slices' thread. Raises :class:`DataError`."""
        dataset = SchedulerData(peer=self._job.scheduler.peer, dataset=self._job.dataset)
        self.fetching = True
        path, file = self._bridge.fetch(dataset)[0]
        self.fetching = False
        assigned = file.slice
        if assigned is None:
            raise DataError(f"the worker did not say which slice {path.name} is")
        columns = read_columns(path)
        samples = len(next(iter(columns.values())))
        if samples != assigned.samples:
            raise DataError(f"slice {assigned.index} has {samples} rows, not the {assigned.samples} promised")
        if self._preprocess is not None:
            columns = self._preprocess(columns)
        # the rows are mapped or in memory: the name is not needed any more, and disks are to stay flat
        path.unlink(missing_ok=True)
        order = slice_order(self._job.seed, assigned.epoch, assigned.index, samples, self._job.shuffle)
        return Slice(
            assigned.epoch, assigned.index, columns, order, (file.generation, file.round, file.attempt)
        )

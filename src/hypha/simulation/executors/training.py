"""A training executor of a simulated world: the real one, with a toy model."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import cast

from msgspec.structs import replace

from hypha.executor.bridge.spans import Traces
from hypha.executor.inner.local_model import LocalModel
from hypha.executor.inner.slices_reader import RowStream, SliceReadAhead
from hypha.executor.toy import ToyModel
from hypha.executor.training import Trainer
from hypha.messages import Contribution, TrainJob
from hypha.simulation.executors.bridge import Bridge

#: what liars say: samples, and how far theta has moved
_CLAIMED, _BLOWN_UP = 10**12, 1e6


class SimulatedTrainer(Trainer):
    """A batch takes ``batch_s()``; what it does wrong stands in ``lies``."""

    def __init__(self, bridge: Bridge, job: TrainJob, batch_s: Callable[[], float], lies: Set[str]) -> None:
        super().__init__(bridge.client, job, Traces(job))
        self._batch_s = batch_s
        self._lies = lies

    async def _load(self) -> None:
        self._toy = ToyModel(self._job.steps)
        self._model = cast("LocalModel", self._toy)
        self._stream = RowStream()
        slices = self._slices = _Slices(self._bridge, self._job, None, self._inbox.changed)
        slices.lies = self._lies
        self._step_s = self._batch_s

    def _synchronise(self) -> None:
        if "withhold" in self._lies:
            return self._tell_all()
        if "blow-up" in self._lies:
            for value in self._toy.local.parameters.values():
                value.add_(_BLOWN_UP)
        return super()._synchronise()

    def _contribution(self) -> Contribution:
        found = super()._contribution()
        return replace(found, samples=_CLAIMED) if "claim" in self._lies else found


class _Slices(SliceReadAhead):
    lies: Set[str]

    def wanted(self) -> bool:
        return "hoard" in self.lies or super().wanted()

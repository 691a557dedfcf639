"""A training executor of a simulated world: the real one."""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

from msgspec.structs import replace

from hypha.executor.bridge.spans import Traces
from hypha.executor.inner.local_model import LocalModel
from hypha.executor.inner.loop import Processor
from hypha.executor.inner.slices_reader import SliceReadAhead
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
        await super()._load()
        self._slices = _Slices(self._bridge, self._job, None, self._inbox.changed)
        self._slices.lies = self._lies
        self._step_s = self._batch_s

    def _build(self, source: Path | None) -> LocalModel:
        # the same on machines with a GPU
        return LocalModel(self._job, source, Processor())

    def _synchronise(self) -> None:
        if "withhold" in self._lies:
            return self._tell_all()
        if "blow-up" in self._lies:
            for value in self._model.theta().parameters.values():
                value.add_(_BLOWN_UP)
        return super()._synchronise()

    def _contribution(self) -> Contribution:
        found = super()._contribution()
        return replace(found, samples=_CLAIMED) if "claim" in self._lies else found


class _Slices(SliceReadAhead):
    lies: Set[str]

    def wanted(self) -> bool:
        return "hoard" in self.lies or super().wanted()

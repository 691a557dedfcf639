"""The parameter server of a simulated world: the real one, with a toy model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hypha.executor.bridge.spans import Traces
from hypha.executor.files import tensors
from hypha.executor.files.theta import Theta
from hypha.executor.models.model_files import ModelFiles
from hypha.executor.parameter_server import ParameterServer
from hypha.executor.toy import toy_theta
from hypha.messages import AggregateJob, CloseRound, Directive, ReceivedFile
from hypha.simulation.executors.bridge import Bridge


class SimulatedParameterServer(ParameterServer):
    """It takes ``step_s`` to close a round."""

    def __init__(self, bridge: Bridge, job: AggregateJob, step_s: float) -> None:
        super().__init__(bridge.client, job, Traces(job))
        self._step_s = step_s

    def _begin_files(self) -> ModelFiles:
        return cast("ModelFiles", _ToyFiles())

    async def _next(self) -> Directive | ReceivedFile | Exception:
        item = await super()._next()
        if isinstance(item, CloseRound) and item.round == self.round:
            await self._bridge.threads.sleep(self._step_s)
        return item


class _ToyFiles:
    """Of the toy model: nothing but theta."""

    notes = ()

    async def first_theta(self) -> Theta:
        return toy_theta()

    async def export(self, theta: Theta, directory: Path) -> list[str]:
        directory.mkdir()  # noqa: ASYNC240 - a simulated disk is fast
        tensors.write(directory / "model.safetensors", theta.all())
        (directory / "config.json").write_bytes(b"{}")
        return ["config.json", "model.safetensors"]

"""The parameter server of a simulated world: the real one."""

from __future__ import annotations

from hypha.executor.bridge.spans import Traces
from hypha.executor.parameter_server import ParameterServer
from hypha.messages import AggregateJob, CloseRound, Directive, ReceivedFile
from hypha.simulation.executors.bridge import Bridge


class SimulatedParameterServer(ParameterServer):
    """It takes ``step_s`` to close a round."""

    def __init__(self, bridge: Bridge, job: AggregateJob, step_s: float) -> None:
        super().__init__(bridge.client, job, Traces(job))
        self._step_s = step_s

    async def _next(self) -> Directive | ReceivedFile | Exception:
        item = await super()._next()
        if isinstance(item, CloseRound) and item.round == self.round:
            await self._bridge.threads.sleep(self._step_s)
        return item

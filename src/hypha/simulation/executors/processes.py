"""The executors of a simulated world: each one is a child process of its worker's, as a real one is.

They run the code of the real ones. A batch takes as long as the machine's speed says.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

import trio

from hypha.errors import HyphaError
from hypha.executor.running import kind_of
from hypha.messages import (
    Alive,
    ExecutorError,
    TrainJob,
)
from hypha.runtime import chance
from hypha.simulation.executors.bridge import Bridge
from hypha.simulation.executors.parameter_server import SimulatedParameterServer
from hypha.simulation.executors.training import SimulatedTrainer
from hypha.simulation.process import SimulatedProcess, this_process
from hypha.worker.bridge.server import BridgeHandlers
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit

_ALIVE_S = 1.0
_SIGKILL, _SIGTERM = 9, 15


class SimulatedExecutors:
    """Runs the executors of one machine, in place of ``worker.jobs.execution.run_process``.

    ``start`` makes a child process of the worker's; a batch takes ``batch_s()`` seconds, loading
    ``load_s()``. What they do wrong stands in ``lies``, as in ``scenario.LIES``.
    """

    def __init__(
        self,
        start: Callable[[str], SimulatedProcess],
        batch_s: Callable[[], float],
        load_s: Callable[[], float],
        lies: Set[str] = frozenset(),
    ) -> None:
        self._start = start
        self._batch_s = batch_s
        self._load_s = load_s
        self._lies = lies
        #: whose batches take until then
        self.stalled: dict[SimulatedProcess, float] = {}
        #: those that run now, by class
        self.running: dict[str, SimulatedProcess] = {}

    async def __call__(
        self,
        handlers: BridgeHandlers,
        socket_path: Path,
        launch: Launch,
        stop: trio.Event,
        grace_s: float,
        kill: trio.Event,
    ) -> Exit:
        job = handlers.job
        kind = "train" if isinstance(job, TrainJob) else "aggregate"
        process = self._start(kind)
        self.running[kind] = process
        code: int | None = None
        tail = ""
        ended = trio.Event()

        async def main() -> None:
            nonlocal code, tail
            code, tail = await self._main(handlers, launch.work_dir)
            process.kill()

        process.on_end.append(ended.set)
        process.spawn(main)
        stopped = False

        async def stop_when_told() -> None:
            nonlocal stopped
            await stop.wait()
            stopped = True
            if not process.frozen:
                process.kill()
            await trio.sleep(grace_s)
            process.kill()

        async def kill_when_told() -> None:
            await kill.wait()
            process.kill()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_when_told)
                nursery.start_soon(kill_when_told)
                await ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            process.kill()
            if self.running.get(kind) is process:
                del self.running[kind]
        if code is None:
            code = -_SIGTERM if stopped else -_SIGKILL
        return Exit(code=code, tail=tail, stopped=stopped)

    async def _main(self, handlers: BridgeHandlers, directory: Path) -> tuple[int, str]:
        """In the executor's process: its exit code and last words."""
        worker = this_process().parent
        if worker is None:
            raise LookupError("an executor is a child of its worker")
        code, tail = 0, ""
        async with trio.open_nursery() as nursery:
            bridge = Bridge(handlers, worker, directory, nursery)
            nursery.start_soon(bridge.run)
            nursery.start_soon(_report_alive, bridge)
            try:
                await trio.sleep(self._load_s())
                job = handlers.job
                while isinstance(job, TrainJob) and "never-load" in self._lies:  # noqa: ASYNC110
                    await trio.sleep(_ALIVE_S)
                if isinstance(job, TrainJob):
                    process = this_process()

                    def batch_s() -> float:
                        stalled_s = self.stalled.get(process, 0.0) - trio.current_time()
                        return max(stalled_s, self._batch_s())

                    await SimulatedTrainer(bridge, job, batch_s, self._lies).run()
                else:
                    await SimulatedParameterServer(bridge, job, 0.01).run()
            except (HyphaError, OSError) as exc:
                tail = f"{type(exc).__name__}: {exc}"
                bridge.report(ExecutorError(kind=kind_of(exc), message=str(exc)))
                code = exc.exit_code if isinstance(exc, HyphaError) else 1
            await bridge.flush()
            nursery.cancel_scope.cancel()
        return code, tail


async def _report_alive(bridge: Bridge) -> None:
    while True:
        await trio.sleep(_ALIVE_S * chance().uniform(0.9, 1.1))
        bridge.report(Alive())

"""Everything that holds one executor to its lease: made before it starts, gone when it has ended.

The kernel's part are :class:`~hypha.worker.limits.limits.Limits`, and what its environment shows of the GPUs;
the rest the worker watches. :attr:`Confined.excess` tells what it was ended, or denied something, for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from hypha.messages import Resources
from hypha.runtime import is_simulated
from hypha.telemetry.instruments import LIMITS_EXCEEDED
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.devices import GpuShare
from hypha.worker.limits.limits import Means, apply_limits
from hypha.worker.limits.usage import Excess, keep_within
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit


class Confined:
    """One executor under ``resources``, with ``gpus`` and ``directory``; ``name`` names its cgroups. Raises
    :class:`ConfigError` when the configuration insists on cgroups and there are none.
    """

    def __init__(
        self, means: Means, name: str, resources: Resources, gpus: GpuShare, directory: JobDirectory
    ) -> None:
        self._limits = apply_limits(means, name, resources, directory.bounded)
        self._means = means
        self._gpus = gpus
        self._directory = directory
        self._keeper: int | None = None
        self.excess: Excess | None = None

    @property
    def description(self) -> str:
        """In words."""
        return self._limits.description

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """``inherited``, and what tells the executor how much it has."""
        hidden = self._means.gpus.hidden()
        return {
            **self._means.gpus.environment(self._gpus, capped=self._means.mode != "none"),
            **{name: value for name, value in inherited.items() if name not in hidden},
            **self._limits.environment,
        }

    def launch(self, launch: Launch) -> Launch:
        """``launch``, whose keeper applies the kernel's part."""
        return replace(
            launch,
            keeper_options=(*launch.keeper_options, *self._limits.launch_options()),
            on_start=self._started,
        )

    def _started(self, keeper: int) -> None:
        self._keeper = keeper

    async def watch(self, exceeded: Callable[[Excess], None]) -> None:
        """Look at what no kernel bounds, and report when it is too much; no simulated executor has that."""

        def found(excess: Excess) -> None:
            self.excess = excess
            exceeded(excess)

        if not is_simulated():
            places, shared = self._directory.occupied, self._directory.part("slices")
            await keep_within(self._limits.quota, places, shared, lambda: self._keeper, found)

    def judge(self, ended: Exit) -> None:
        """It has ended, and nobody knows why: was it denied something? Counts what was exceeded."""
        if self.excess is None and ended.code != 0 and not ended.stopped:
            self.excess = self._limits.denied()
        if self.excess is not None:
            LIMITS_EXCEEDED.add(resource=self.excess.resource)

    async def remove(self) -> None:
        """Once none of its processes is left."""
        await self._limits.remove()

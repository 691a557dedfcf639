"""AIM: its own repository in ``directory``, or an ``aim://`` server. For the driver that came with the Rust
Hypha, which takes the figures over HTTP, see :mod:`hypha.sinks.bridge`.
"""

from __future__ import annotations

from typing import Any

from hypha.sinks.interface import Destination, RoundValues, RunInfo, library, own_directory


class Aim:
    """A round that is told again replaces what was tracked at that step."""

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Go on with the run that has the job's id among its parameters; AIM makes up hashes itself."""
        aim = library("aim")
        place = destination.url or str(own_directory(destination))
        repo = aim.Repo(place) if destination.url else aim.Repo.from_path(place, init=True)
        query = f"run.hypha_job == {run.job_id!r}"
        earlier = [found.run.hash for found in repo.query_runs(query).iter_runs()]
        self._run: Any = aim.Run(
            run_hash=earlier[0] if earlier else None,
            repo=repo,
            experiment=destination.project,
            # of the job, not of this machine
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        if not earlier:
            self._run.name = destination.name
            self._run["hypha_job"] = run.job_id
            self._run["hparams"] = run.settings

    def record(self, values: RoundValues) -> None:
        """Track each figure; a worker's has its PeerID as context."""
        for name, value in values.values.items():
            self._run.track(value, name=name, step=values.round, epoch=values.round)
        for worker, figures in values.workers.items():
            for name, value in figures.items():
                context = {"worker": worker}
                self._run.track(value, name=name, step=values.round, epoch=values.round, context=context)

    def close(self) -> None:
        """Finalise the run."""
        self._run.close()

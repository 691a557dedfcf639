"""Weights & Biases: a run with the job's id, online or offline."""

from __future__ import annotations

from typing import Any

from hypha.sinks.interface import Destination, RoundValues, RunInfo, library, own_directory

#: longer than that nobody waits for its server
_TIMEOUT_S = 20


class WandB:
    """Its history can only be added to, and its steps only grow: charts are over ``round``, and of a job that
    went back they show a round twice. Offline, every run of the scheduler leaves a directory of its own with
    the same run's id; ``wandb sync`` brings them together.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Go on with the run of that id."""
        wandb = library("wandb")
        server = {"base_url": destination.url} if destination.url else {}
        key = {"api_key": destination.token} if destination.token else {}
        settings = wandb.Settings(
            mode="offline" if destination.offline else "online",
            silent=True,
            console="off",
            init_timeout=_TIMEOUT_S,
            login_timeout=_TIMEOUT_S,
            finish_timeout=_TIMEOUT_S,
            # the job's metrics, and nothing about this machine
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            **server,
            **key,
        )
        self._run: Any = wandb.init(
            project=destination.project,
            name=destination.name,
            id=run.job_id,
            resume="allow",
            dir=str(own_directory(destination)),
            config=run.settings,
            settings=settings,
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def record(self, values: RoundValues) -> None:
        """Hand a row to its service, which writes it to the disk and uploads it."""
        self._run.log({"round": values.round, **values.flat()})

    def close(self) -> None:
        """Wait for what is left to upload."""
        self._run.finish()

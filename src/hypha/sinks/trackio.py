"""trackio: a local SQLite file, or a trackio server of one's own."""

from __future__ import annotations

from typing import Any

from hypha.config.environment import set_variable
from hypha.sinks.interface import Destination, RoundValues, RunInfo, library, own_directory


class Trackio:
    """``directory`` is what trackio calls ``TRACKIO_DIR``. Of a job that went back it shows a round twice."""

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Go on with the run of that name: a job's id, as trackio tells runs apart by their names."""
        # read when it is imported
        set_variable("TRACKIO_DIR", str(own_directory(destination)))
        if destination.token:
            set_variable("TRACKIO_WRITE_TOKEN", destination.token)
        trackio = library("trackio")
        self._run: Any = trackio.init(
            project=destination.project,
            name=run.job_id,
            group=destination.name,
            server_url=destination.url,
            config=run.settings,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def record(self, values: RoundValues) -> None:
        """Give it a row; its own thread writes that within a second."""
        self._run.log(values.flat(), step=values.round)

    def close(self) -> None:
        """Have all rows written."""
        self._run.finish()

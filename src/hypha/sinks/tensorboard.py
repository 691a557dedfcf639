"""TensorBoard: event files in ``<directory>/<job>``, written with the ``tensorboard`` package alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypha.sinks.interface import Destination, RoundValues, RunInfo, library


class TensorBoard:
    """Each run of the scheduler adds a file. What it says first is that rounds from its first one on replace
    those that were written before, so a job that went back shows each round once.
    """

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Make a file."""
        self._events = library("tensorboard.compat.proto.event_pb2")
        self._summaries = library("tensorboard.compat.proto.summary_pb2")
        writing = library("tensorboard.summary.writer.event_file_writer")
        directory = Path(destination.directory) / run.job_id
        directory.mkdir(parents=True, exist_ok=True)
        self._writer: Any = writing.EventFileWriter(str(directory))
        self._last: int | None = None

    def record(self, values: RoundValues) -> None:
        """Add an event, and have it on the disk."""
        if self._last is None or values.round <= self._last:
            log = self._events.SessionLog
            self._add(values, session_log=log(status=log.START))
        self._last = values.round
        scalars = [
            self._summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in values.flat().items()
        ]
        self._add(values, summary=self._summaries.Summary(value=scalars))
        self._writer.flush()

    def _add(self, values: RoundValues, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=values.at, step=values.round, **content))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

"""A scheduler's job for the live page and ``/status``: the newest snapshot, the history of its rounds, and
the log's last warnings.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable

import msgspec
import trio

from hypha.cli.job.redaction import redacted
from hypha.naming import name_of, named
from hypha.scheduler.status.history import History
from hypha.scheduler.status.round_record import Now, Past, RoundRecord
from hypha.scheduler.status.snapshot import JobSnapshot, LogLine
from hypha.telemetry.logs import level_name
from hypha.telemetry.page import Message

#: lines kept, and characters of each
KEPT_LINES, _MAX_TEXT = 20, 500


class LastWarnings(logging.Handler):
    """The log's last warnings and errors, without ``secrets``; works in any thread."""

    def __init__(self, secrets: Collection[str] = ()) -> None:
        super().__init__(logging.WARNING)
        self._secrets = secrets
        self._number = 0
        self._lines: deque[LogLine] = deque(maxlen=KEPT_LINES)

    @property
    def lines(self) -> tuple[LogLine, ...]:
        """The newest at the end."""
        return tuple(self._lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line. Never raises."""
        try:
            text = named(redacted(record.getMessage(), self._secrets))
        except Exception:  # noqa: BLE001 - a log line must not end whoever wrote it
            self.handleError(record)
            return
        self._number += 1
        peer = str(getattr(record, "worker_peer_id", getattr(record, "peer_id", "")))
        line = LogLine(
            number=self._number,
            at=record.created,
            level=level_name(record.levelno),
            logger=record.name,
            message=text[:_MAX_TEXT],
            peer=peer,
            name=name_of(peer),
        )
        self._lines.append(line)


class JobPage:
    """What viewers of one job receive. ``warnings`` are asked for with every look, and have no secrets any
    more, nor has ``history``; from what the job itself reports, ``secrets`` are taken out here.
    """

    def __init__(
        self,
        job: JobSnapshot,
        history: History,
        warnings: Callable[[], tuple[LogLine, ...]],
        secrets: Collection[str] = (),
    ) -> None:
        self._job = job
        self._history = history
        self._warnings = warnings
        self._secrets = secrets

    def observe(self, job: JobSnapshot) -> None:
        """The job has come to this."""
        self._job = job

    def status(self) -> JobSnapshot:
        """What ``/status`` answers."""
        return msgspec.structs.replace(
            self._job,
            message=named(redacted(self._job.message, self._secrets)),
            output=redacted(self._job.output, self._secrets),
            warnings=self._warnings(),
        )

    def begin(self) -> Callable[[], Iterable[Message]]:
        """For one viewer: everything at first, then what is new."""
        viewer = _Viewer(self, self._history)
        return viewer.news


class _Viewer:
    """What one viewer has received."""

    def __init__(self, page: JobPage, history: History) -> None:
        self._page = page
        self._history = history
        self._replaced = -1
        self._number = 0

    def news(self) -> list[Message]:
        history, messages = self._history, list[Message]()
        rounds: tuple[RoundRecord, ...] = ()
        if self._replaced != history.replaced:
            messages.append(("past", Past(history.records)))
        else:
            rounds = history.since(self._number)
        self._replaced, self._number = history.replaced, history.number
        now = Now(self._page.status(), rounds, history.open_round(trio.current_time()))
        return [*messages, ("now", now)]

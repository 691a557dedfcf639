"""Running a job with eyes on it: a live panel in a terminal, over local HTTP the live page and ``/status``,
and in the job's state directory the history of its rounds.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio
from rich.console import Console

from hypha.cli.job.redaction import redacted, secrets_in
from hypha.cli.job.status import live_view
from hypha.config.advice import advice
from hypha.config.environment import process_environment
from hypha.config.models import SchedulerConfig
from hypha.config.otel import resolve_telemetry
from hypha.errors import ConfigError, Problem
from hypha.journal import Journal
from hypha.naming import name_of, named
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler.job.run import run_job
from hypha.scheduler.job.states import JobResult, Observation
from hypha.scheduler.status.history import History, keep_history
from hypha.scheduler.status.round_record import Now, Past, RoundRecord
from hypha.scheduler.status.snapshot import JobSnapshot, LogLine
from hypha.telemetry import health_of, serve_http
from hypha.telemetry.http.hosts import is_loopback
from hypha.telemetry.logs import level_name
from hypha.telemetry.page import Message, PageFeed, page_routes, token_in

#: who looks at the page is told how the job ended within
_LAST_NEWS_S = 0.3
#: warnings kept, and characters of each
KEPT_LINES, _MAX_TEXT = 20, 500

Job = Callable[..., Any]

logger = logging.getLogger(__name__)


async def run_scheduler(
    config: SchedulerConfig, live: bool, fresh: bool = False, journal: Path | None = None
) -> None:
    """Run the job to its end and say where the model is; ``fresh``: not from where an earlier run stopped.
    What its machines decide is appended to the file ``journal``. Raises the HyphaError that ended it.
    """
    name, rounds = config.scheduler.job.name, config.scheduler.job.rounds.update_rounds
    secrets = secrets_in(config)
    history = History(redact=lambda text: named(redacted(text, secrets)))
    results: list[JobResult] = []

    with ExitStack() as stack:
        warnings = LastWarnings(secrets)
        logging.getLogger().addHandler(warnings)
        stack.callback(logging.getLogger().removeHandler, warnings)
        for one in advice(config):
            logger.warning("Advice on %s", one)
        page = JobPage(JobSnapshot(name=name, rounds=rounds), history, lambda: warnings.lines, secrets)
        try:
            noted = Journal(file=journal)
        except OSError as exc:
            message = f"{journal} cannot be written: {exc.strerror}"
            raise ConfigError([Problem("--journal", message)]) from exc
        stack.callback(noted.close)
        noted.listeners.append(history.note)

        telemetry = resolve_telemetry("hypha-scheduler", config, process_environment())

        async def job(*, task_status: trio.TaskStatus[Node]) -> None:
            seen = Observation(observe, noted, telemetry.trace_ratio)
            results.append(await run_job(config, seen, fresh=fresh, task_status=task_status))

        show = stack.enter_context(live_view(Console())) if live else None

        def observe(snapshot: JobSnapshot) -> None:
            page.job = snapshot
            if show is not None:
                show(snapshot)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_history, history, config.state_dir / name)
            if config.http_address is None:
                await job(task_status=trio.TASK_STATUS_IGNORED)
            else:
                await serve_page(config.http_address, config.state_dir / name, job, page)
            nursery.cancel_scope.cancel()
    for result in results:
        size = f"{result.rounds} rounds, {result.samples} samples"
        print(f"{result.name}: {size}; the model is in {result.output}")


async def serve_page(address: str, directory: Path, job: Job, page: JobPage) -> None:
    """Serve the page while ``job`` runs. Raises :class:`ConfigError` when it cannot be."""
    token, file = None, None
    if not is_loopback(address):
        token, file = await in_thread(token_in, directory)
    feed = PageFeed(page.begin)
    routes = await in_thread(page_routes, feed, page.status, token)
    async with trio.open_nursery() as nursery:
        try:
            async with trio.open_nursery() as work:
                node: Node = await work.start(job)
                health = partial(health_of, node)
                actual = await nursery.start(partial(serve_http, address, health, routes=routes))
                _tell_address(actual, token, file)
        finally:
            with trio.CancelScope(shield=True):
                await feed.finish(_LAST_NEWS_S)
        nursery.cancel_scope.cancel()


def _tell_address(address: str, token: str | None, file: Path | None) -> None:
    """A token is shown to whoever sits at the terminal alone: logs are read by others, too."""
    if sys.stdout.isatty():
        print(f"The live page: http://{address}/" + (f"?token={token}" if token else ""))
    elif token:
        logger.info("The live page on http://%s/ asks for the token in %s.", address, file)


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
        self._lines.append(
            LogLine(
                number=self._number,
                at=record.created,
                level=level_name(record.levelno),
                logger=record.name,
                message=text[:_MAX_TEXT],
                peer=peer,
                name=name_of(peer),
            )
        )


@dataclass
class JobPage:
    """What viewers of one job receive. ``warnings`` are asked for with every look, and have no secrets any
    more, nor has ``history``; from what the job itself reports, ``secrets`` are taken out here.
    """

    job: JobSnapshot
    history: History
    warnings: Callable[[], tuple[LogLine, ...]]
    secrets: Collection[str] = ()

    def status(self) -> JobSnapshot:
        """What ``/status`` answers."""
        return msgspec.structs.replace(
            self.job,
            message=named(redacted(self.job.message, self.secrets)),
            output=redacted(self.job.output, self.secrets),
            warnings=self.warnings(),
        )

    def begin(self) -> Callable[[], Iterable[Message]]:
        """For one viewer: everything at first, then what is new."""
        history, replaced, seen = self.history, -1, 0

        def news() -> list[Message]:
            nonlocal replaced, seen
            messages: list[Message] = []
            rounds: tuple[RoundRecord, ...] = ()
            if replaced != history.replaced:
                messages.append(("past", Past(history.records)))
            else:
                rounds = history.since(seen)
            replaced, seen = history.replaced, history.changes.count
            now = Now(self.status(), rounds, history.open_round(trio.current_time()))
            return [*messages, ("now", now)]

        return news

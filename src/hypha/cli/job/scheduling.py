"""Running a job with eyes on it: a live panel in a terminal, over local HTTP the live page and ``/status``,
and in the job's state directory the history of its rounds.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from hypha.cli.job.live import live_view
from hypha.cli.job.page import JobPage, LastWarnings
from hypha.cli.job.redaction import redacted, secrets_in
from hypha.config.advice import advice
from hypha.config.environment import process_environment
from hypha.config.models import SchedulerConfig
from hypha.config.otel import resolve_telemetry
from hypha.errors import ConfigError, Problem
from hypha.journal import Journal
from hypha.naming import named
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler import JobResult, JobSnapshot, Observation, run_job
from hypha.scheduler.status.history import History, keep_history
from hypha.telemetry import health_of, serve_http
from hypha.telemetry.http.hosts import is_loopback
from hypha.telemetry.page import Access, PageFeed, page_routes, token_in

#: who looks at the page is told how the job ended within
_LAST_NEWS_S = 0.3

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
        warnings = stack.enter_context(_last_warnings(secrets))
        for one in advice(config):
            logger.warning("Advice on %s", one)
        page = JobPage(JobSnapshot(name=name, rounds=rounds), history, lambda: warnings.lines, secrets)
        shows: list[Callable[[JobSnapshot], None]] = [page.observe]
        noted = _opened(journal)
        stack.callback(noted.close)
        noted.listeners.append(history.note)

        def observe(snapshot: JobSnapshot) -> None:
            for show in shows:
                show(snapshot)

        async def job(*, task_status: trio.TaskStatus[Node]) -> None:
            results.append(
                await run_job(
                    config,
                    Observation(observe, noted, trace_ratio(config)),
                    fresh=fresh,
                    task_status=task_status,
                )
            )

        if live:
            shows.append(stack.enter_context(live_view(Console())))
        async with _kept(history, config.state_dir / name):
            if config.http_address is None:
                await job(task_status=trio.TASK_STATUS_IGNORED)
            else:
                await serve_page(config.http_address, config.state_dir / name, job, page)
    for result in results:
        size = f"{result.rounds} rounds, {result.samples} samples"
        print(f"{result.name}: {size}; the model is in {result.output}")


def trace_ratio(config: SchedulerConfig) -> float | None:
    """The share of rounds that is traced; ``None`` where no traces are sent."""
    return resolve_telemetry("hypha-scheduler", config, process_environment()).trace_ratio


def _opened(journal: Path | None) -> Journal:
    """Raises :class:`ConfigError` when it cannot be written."""
    try:
        return Journal(file=journal)
    except OSError as exc:
        raise ConfigError([Problem("--journal", f"{journal} cannot be written: {exc.strerror}")]) from exc


async def serve_page(address: str, directory: Path, job: Job, page: JobPage) -> None:
    """Serve the page while ``job`` runs. Raises :class:`ConfigError` when it cannot be."""
    token, file = None, None
    if not is_loopback(address):
        token, file = await in_thread(token_in, directory)
    feed = PageFeed(page.begin)
    routes = await in_thread(page_routes, feed, page.status, Access(token))
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


@contextmanager
def _last_warnings(secrets: Collection[str]) -> Iterator[LastWarnings]:
    """The log's last warnings, from now on."""
    handler = LastWarnings(secrets)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)


@asynccontextmanager
async def _kept(history: History, directory: Path) -> AsyncIterator[None]:
    """The history is kept in the job's state directory meanwhile."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_history, history, directory)
        yield
        nursery.cancel_scope.cancel()

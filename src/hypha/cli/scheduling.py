"""Running a job with eyes on it: a live panel in a terminal, ``/status`` over local HTTP."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from hypha.cli.live import live_view
from hypha.config.environment import process_environment
from hypha.config.models import SchedulerConfig
from hypha.config.otel import resolve_telemetry
from hypha.errors import ConfigError, Problem
from hypha.journal import Journal
from hypha.node import Node
from hypha.scheduler import JobResult, JobSnapshot, run_job
from hypha.telemetry import health_of, serve_http


async def run_scheduler(
    config: SchedulerConfig, live: bool, fresh: bool = False, journal: Path | None = None
) -> None:
    """Run the job to its end and say where the model is; ``fresh``: not from where an earlier run stopped.
    What its machines decide is appended to the file ``journal``. Raises the HyphaError that ended it.
    """
    latest = JobSnapshot(name=config.scheduler.job.name, rounds=config.scheduler.job.rounds.update_rounds)
    shows: list[Callable[[JobSnapshot], None]] = []
    results: list[JobResult] = []

    def observe(snapshot: JobSnapshot) -> None:
        nonlocal latest
        latest = snapshot
        for show in shows:
            show(snapshot)

    async def job(*, task_status: trio.TaskStatus[Node]) -> None:
        results.append(
            await run_job(
                config,
                observe=observe,
                fresh=fresh,
                journal=noted,
                trace_ratio=trace_ratio(config),
                task_status=task_status,
            )
        )

    with ExitStack() as stack:
        noted = _opened(journal)
        stack.callback(noted.close)
        if live:
            shows.append(stack.enter_context(live_view(Console())))
        async with trio.open_nursery() as nursery:
            if config.http_address is None:
                await job(task_status=trio.TASK_STATUS_IGNORED)
            else:
                await _with_http(nursery, config.http_address, job, lambda: latest)
            nursery.cancel_scope.cancel()
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


async def _with_http(
    nursery: trio.Nursery, address: str, job: Callable[..., Any], status: Callable[[], JobSnapshot]
) -> None:
    async with trio.open_nursery() as work:
        node: Node = await work.start(job)
        await nursery.start(partial(serve_http, address, lambda: health_of(node), status))

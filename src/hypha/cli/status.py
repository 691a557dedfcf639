"""``hypha status``: what a scheduler's local HTTP says of its job, once or as it goes on."""

from __future__ import annotations

import time
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console

from hypha.errors import HyphaError, JobFailed
from hypha.scheduler.snapshot import JobSnapshot

_INTERVAL_S = 0.5
_TIMEOUT_S = 5.0
#: A scheduler that is busy, or being restarted, is asked again for so long.
_PATIENCE_S = 10.0


def status(
    address: Annotated[str, typer.Argument(help="The scheduler's http_address, such as 127.0.0.1:9090.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
) -> None:
    """Print what a scheduler's job is doing."""
    from hypha.cli.live import job_panel, live_view

    url = f"{address if '://' in address else f'http://{address}'}".rstrip("/") + "/status"
    console = Console()
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
        seen = _ask(client, url)
        if not follow:
            # what reads a pipe looks for words in a line, however narrow the terminal it was started from
            console.print(job_panel(seen), soft_wrap=not console.is_terminal)
            return
        with live_view(console) as show:
            asked = time.monotonic()
            while seen.state not in ("done", "failed"):
                show(seen)
                time.sleep(_INTERVAL_S)
                try:
                    seen = _ask(client, url)
                    asked = time.monotonic()
                except Unanswered as exc:
                    if time.monotonic() - asked > _PATIENCE_S:
                        raise Unanswered(f"{exc}; the job was last seen {seen.state}") from exc
            show(seen)
    if seen.state == "failed":
        raise JobFailed(seen.message or "the job failed")


class Unanswered(HyphaError):
    """There is no scheduler at the address, or not any more."""


def _ask(client: httpx.Client, url: str) -> JobSnapshot:
    try:
        answer = client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise Unanswered(f"{url} does not answer: {exc}") from exc
    if answer.status_code != httpx.codes.OK:
        raise HyphaError(
            f"{url} answers with HTTP status {answer.status_code}: is that a scheduler's address?"
        )
    try:
        return msgspec.json.decode(answer.content, type=JobSnapshot)
    except msgspec.DecodeError as exc:
        raise HyphaError(f"{url} is not the status of a job: {exc}") from exc

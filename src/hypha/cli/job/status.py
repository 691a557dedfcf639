"""``hypha status``: what a scheduler's local HTTP reports of its job, once or as it goes on: rounds,
throughput, nodes and leases, what it waits for, and the log's last warnings. Of a node without a job, such
as a worker, it prints what that reports of its health: its resources and by what they are enforced, among
other things.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console

from hypha.cli.component import HTTP_PORTS
from hypha.decoding import decode_json
from hypha.errors import HyphaError, JobFailed, Undecodable
from hypha.messages import HealthReport
from hypha.scheduler.status.snapshot import JobSnapshot

_INTERVAL_S = 0.5
_TIMEOUT_S = 5.0
#: A scheduler that is busy, or being restarted, is asked again for so long.
_PATIENCE_S = 10.0


def status(
    address: Annotated[
        str,
        typer.Argument(help="A node's http_address; default: the one that init writes for a scheduler."),
    ] = f"127.0.0.1:{HTTP_PORTS['scheduler']}",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job has ended.")] = False,
    token: Annotated[
        Path | None,
        typer.Option(help="For an address beyond loopback: the file page-token of the job's state."),
    ] = None,
) -> None:
    """Print what a scheduler's job is doing, or how another node is."""
    from hypha.cli.job.live import live_view, status_panel
    from hypha.cli.probing import show_health

    url = f"{address if '://' in address else f'http://{address}'}".rstrip("/") + "/status"
    console = Console()
    headers = {} if token is None else {"authorization": f"Bearer {_read(token)}"}
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False, headers=headers) as client:
        first = _ask_any(client, url)
        if isinstance(first, HealthReport):
            show_health(address, first)
            return
        seen = first
        if not follow:
            # what reads a pipe looks for words in a line, however narrow the terminal it was started from
            console.print(status_panel(seen), soft_wrap=not console.is_terminal)
            return
        with live_view(console, status_panel) as show:
            asked = time.monotonic()
            while seen.state not in ("done", "failed"):
                show(seen)
                time.sleep(_INTERVAL_S)
                try:
                    seen = _ask(client, url)
                    asked = time.monotonic()
                except StatusUnanswered as exc:
                    if time.monotonic() - asked > _PATIENCE_S:
                        raise StatusUnanswered(f"{exc}; the job was last seen {seen.state}") from exc
            show(seen)
    if seen.state == "failed":
        raise JobFailed(seen.message or "the job failed")


class StatusUnanswered(HyphaError):
    """There is no scheduler at the address, or not any more."""


def _ask_any(client: httpx.Client, url: str) -> JobSnapshot | HealthReport:
    """A node that is no scheduler has no ``/status``, and every node has ``/health``."""
    answer = _get(client, url)
    if answer.status_code != httpx.codes.NOT_FOUND:
        return _snapshot(url, answer)
    health = url.removesuffix("/status") + "/health"
    try:
        return decode_json(_get(client, health).content, HealthReport)
    except Undecodable as exc:
        raise HyphaError(f"{health} is not what a node says of its health: {exc}") from exc


def _get(client: httpx.Client, url: str) -> httpx.Response:
    try:
        return client.get(url)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise StatusUnanswered(f"{url} does not answer: {exc}") from exc


def _ask(client: httpx.Client, url: str) -> JobSnapshot:
    return _snapshot(url, _get(client, url))


def _snapshot(url: str, answer: httpx.Response) -> JobSnapshot:
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise HyphaError(f"{url} asks for the token of its job's state directory: --token FILE")
    if answer.status_code != httpx.codes.OK:
        raise HyphaError(
            f"{url} answers with HTTP status {answer.status_code}: is that a scheduler's address?"
        )
    try:
        return decode_json(answer.content, JobSnapshot)
    except Undecodable as exc:
        raise HyphaError(f"{url} is not the status of a job: {exc}") from exc


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise HyphaError(f"the token cannot be read: {exc}") from exc

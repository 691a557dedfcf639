"""``hypha status``: what a scheduler's local HTTP reports of its job, once or as it goes on: rounds,
throughput, nodes and leases, what it waits for, and the log's last warnings. Of a node without a job, such
as a worker, it prints what that reports of its health: its resources and by what they are enforced, among
other things. Where the job runs, too, a panel follows it: a short one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hypha.cli.asking import NotThere, Unanswered, ask_local, local_health
from hypha.cli.component import HTTP_PORTS
from hypha.cli.printing import add_row, shown, table_of
from hypha.errors import HyphaError, JobFailed
from hypha.naming import named
from hypha.naming import shown as node
from hypha.scheduler.status.snapshot import JobSnapshot

_INTERVAL_S = 0.5
#: A scheduler that is busy, or being restarted, is asked again for so long.
_PATIENCE_S = 10.0
#: Worker rows shown; a hundred would push the rest off the screen.
MAX_ROWS = 12
#: and warnings
MAX_LINES = 5


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
    from hypha.cli.probing import show_health

    console, secret = Console(), "" if token is None else _read(token)
    try:
        seen = ask_local(address, "status", JobSnapshot, secret)
    except NotThere:
        # a node that is no scheduler has no /status, and every node has /health
        show_health(address, local_health(address))
        return
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
                seen = ask_local(address, "status", JobSnapshot, secret)
                asked = time.monotonic()
            except Unanswered as exc:
                if time.monotonic() - asked > _PATIENCE_S:
                    raise Unanswered(f"{exc}; the job was last seen {seen.state}") from exc
        show(seen)
    if seen.state == "failed":
        raise JobFailed(seen.message or "the job failed")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise HyphaError(f"the token cannot be read: {exc}") from exc


def job_panel(job: JobSnapshot) -> RenderableType:
    parts: list[RenderableType] = [headline(job), ProgressBar(total=max(job.rounds, 1), completed=job.round)]
    if job.message:
        parts.append(shown(named(job.message), "yellow" if job.state == "paused" else "dim"))
    if job.workers:
        parts.append(_workers(job))
    return Group(*parts)


def status_panel(job: JobSnapshot) -> RenderableType:
    parts = [job_panel(job)]
    if job.held:
        parts.append(_leases(job))
    if job.connections:
        parts.append(_connections(job))
    observed = [_goodput(job), _data(job), _refused(job), _versions(job)]
    parts += [shown(field, "dim") for field in observed if field]
    for line in job.warnings[-MAX_LINES:]:
        when = datetime.fromtimestamp(line.at).strftime("%H:%M:%S")
        style = "red" if line.level == "error" else "yellow"
        peer = f" [{node(line.peer, line.name)}]" if line.peer else ""
        parts.append(shown(f"{when} {line.level} {line.message}{peer}", style))
    return Group(*parts)


@contextmanager
def live_view(
    console: Console, panel: Callable[[JobSnapshot], RenderableType] = job_panel
) -> Iterator[Callable[[JobSnapshot], None]]:
    """Show what is passed to the yielded function. Standard error goes above the panel meanwhile.

    Where no terminal is, a line is printed for each round and each other message, and the panel at the end.
    """
    if not console.is_terminal:
        last: JobSnapshot | None = None

        def tell(snapshot: JobSnapshot) -> None:
            nonlocal last
            seen = None if last is None else (last.state, last.round, last.message)
            if seen != (snapshot.state, snapshot.round, snapshot.message):
                console.print(headline(snapshot), shown(snapshot.message), soft_wrap=True)
                console.file.flush()
            last = snapshot

        yield tell
        if last is not None:
            console.print(panel(last), soft_wrap=True)
        return
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield lambda snapshot: live.update(panel(snapshot))


def headline(job: JobSnapshot) -> Text:
    """``job training, round 3/20, loss 0.41, 812 samples/s, 3 workers, 4 leases, 12 s``."""
    words = [
        f"{job.name} {job.state}",
        f"round {job.round}/{job.rounds}",
        f"loss {job.loss:.4f}" if job.loss is not None else "loss -",
        f"{job.samples_per_s:.0f} samples/s",
        f"{job.samples} samples",
        f"{len(job.workers)} workers",
        f"{job.leases} leases",
        f"{job.elapsed_s:.0f} s",
    ]
    return shown(", ".join(words))


def _workers(job: JobSnapshot) -> Table:
    numbers = ("batch", "of", "size", "samples/s", "idle", "samples", "loss")
    table = table_of("worker", "state", right=numbers)
    for worker in job.workers[:MAX_ROWS]:
        add_row(
            table,
            node(worker.peer, worker.name),
            worker.state,
            str(worker.batches),
            str(worker.planned) if worker.planned is not None else "-",
            str(worker.batch_size),
            f"{worker.samples_per_s:.0f}",
            f"{worker.idle_share:.1%}" if worker.idle_share is not None else "-",
            str(worker.samples),
            f"{worker.loss:.4f}" if worker.loss is not None else "-",
        )
    return _cut(table, len(job.workers))


def _leases(job: JobSnapshot) -> Table:
    table = table_of("lease", "worker", "version", "for", "hardware", right=("price", "expires in"))
    for lease in job.held[:MAX_ROWS]:
        units = {"cores": lease.cpu, "GB": lease.memory, "GB of GPU": lease.gpu, "GB of disk": lease.storage}
        hardware = ", ".join(f"{amount:g} {unit}" for unit, amount in units.items() if amount)
        ends = f"{lease.expires_in_s:.0f} s" + (", unreachable" if lease.suspected else "")
        if lease.leaves_in_s is not None:
            ends = f"{lease.leaves_in_s:.0f} s, its worker leaves"
        purpose = "training" if lease.kind == "train" else "server"
        worker, version = node(lease.peer, lease.name), lease.version or "not stated"
        add_row(table, lease.lease[:8], worker, version, purpose, hardware, f"{lease.price:g}", ends)
    return _cut(table, len(job.held))


def _connections(job: JobSnapshot) -> Table:
    table = table_of("node", "role", "path", right=("round trip",))
    for one in job.connections[:MAX_ROWS]:
        trip = "-" if one.round_trip_s is None else f"{one.round_trip_s * 1000:.1f} ms"
        add_row(table, node(one.peer, one.name), ", ".join(one.roles) or "any", one.kind, trip)
    return _cut(table, len(job.connections))


def _cut(table: Table, rows: int) -> Table:
    if rows > MAX_ROWS:
        add_row(table, f"and {rows - MAX_ROWS} more")
    return table


def _data(job: JobSnapshot) -> str:
    if job.slices is None:
        return ""
    counts = job.slices
    states = f"{counts.available} available, {counts.assigned} with workers, {counts.used} used"
    return f"{job.dataset}: epoch {job.epoch + 1}, slices {states}; {job.providers} data nodes"


def _refused(job: JobSnapshot) -> str:
    counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(job.refused.items()) if count)
    return f"ignored or refused: {counts}" if counts else ""


def _versions(job: JobSnapshot) -> str:
    if not job.version:
        return ""
    others = len({lease.peer for lease in job.held if lease.version != job.version})
    differing = f"; {others} of its workers run other versions" if others else ""
    for one in job.services:
        if one.version != job.version:
            differing += (
                f"; {one.kind} {node(one.peer, one.name)} runs {one.version or 'one that states none'}"
            )
    return f"the scheduler runs Hypha {job.version}{differing}"


def _goodput(job: JobSnapshot) -> str:
    report = job.goodput
    if report is None:
        return ""
    lost = sorted(report.badput_s.items(), key=lambda one: -one[1])
    parts = [f"{reason.replace('-', ' ')} {seconds:.0f} s" for reason, seconds in lost if seconds >= 0.5]
    total = f"goodput {report.share:.0%} of {report.wall_s * report.places:.0f} worker seconds"
    return f"{total}; lost: {', '.join(parts)}" if parts else total

"""A job in the terminal: one panel that follows the scheduler's snapshots, above it the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hypha.scheduler.snapshot import JobSnapshot

#: Worker rows shown; a hundred would push the rest off the screen.
MAX_ROWS = 12


@contextmanager
def live_view(console: Console) -> Iterator[Callable[[JobSnapshot], None]]:
    """Show what is passed to the yielded function. Standard error goes above the panel meanwhile."""
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield lambda snapshot: live.update(job_panel(snapshot))


def job_panel(job: JobSnapshot) -> RenderableType:
    """The whole panel."""
    parts: list[RenderableType] = [headline(job), ProgressBar(total=max(job.rounds, 1), completed=job.round)]
    if job.message:
        parts.append(Text(job.message, style="yellow" if job.state == "paused" else "dim"))
    if job.workers:
        parts.append(_workers(job))
    return Group(*parts)


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
    return Text(", ".join(words))


def _workers(job: JobSnapshot) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("worker", "state", "batch", "of", "size", "samples/s", "samples", "loss"):
        table.add_column(name, justify="left" if name in ("worker", "state") else "right")
    for worker in job.workers[:MAX_ROWS]:
        table.add_row(
            f"...{worker.peer[-8:]}",
            worker.state,
            str(worker.batches),
            str(worker.planned) if worker.planned is not None else "-",
            str(worker.batch_size),
            f"{worker.samples_per_s:.0f}",
            str(worker.samples),
            f"{worker.loss:.4f}" if worker.loss is not None else "-",
        )
    if len(job.workers) > MAX_ROWS:
        table.add_row(f"and {len(job.workers) - MAX_ROWS} more", *[""] * 7)
    return table

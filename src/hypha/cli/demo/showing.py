"""What the demo shows while it runs: a live panel in a terminal, else a line where something changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from hypha.cli.job.live import headline, job_panel, shown
from hypha.scheduler.status.snapshot import JobSnapshot


class Show:
    """Stages and the job's snapshots, to ``console``."""

    def __init__(self, console: Console, live: Live | None) -> None:
        self._console = console
        self._live = live
        self._stage = ""
        self._panel: RenderableType | None = None
        self._told: tuple[str, int, str] | None = None

    def stage(self, text: str) -> None:
        """The demo has come to this."""
        self._stage = text
        if self._live is None:
            self.line(text)
        else:
            self._update(self._live)

    def job(self, job: JobSnapshot) -> None:
        """The job has come to this."""
        if self._live is not None:
            self._panel = job_panel(job)
            self._update(self._live)
            return
        told = (job.state, job.round, job.message)
        if told != self._told:
            self._told = told
            self.line(headline(job).plain + (f": {job.message}" if job.message else ""))

    def _update(self, live: Live) -> None:
        stage = Text(self._stage)
        live.update(stage if self._panel is None else Group(stage, self._panel))

    def line(self, text: str) -> None:
        """A line that stays, above what is live."""
        self._console.print(shown(text), highlight=False, soft_wrap=True)
        self._console.file.flush()


@contextmanager
def show_on(console: Console) -> Iterator[Show]:
    """A live display when ``console`` is a terminal."""
    if not console.is_terminal:
        yield Show(console, None)
        return
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        yield Show(console, live)

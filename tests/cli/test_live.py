"""What peers have written stands in the terminal as it is: no markup, nothing that controls a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from hypha.cli.demo.showing import Show
from hypha.cli.live import status_panel
from hypha.cli.probing import Found, show_report
from hypha.messages import HealthReport
from hypha.scheduler.snapshot import ConnectionSnapshot, JobSnapshot, LeaseSnapshot, LogLine, WorkerSnapshot

#: a closing tag of nothing, an emoji's name, and what clears the screen; short enough for every cell
HOSTILE = ("[/b]x", ":bug:", "\x1b[2J")


def job(text: str) -> JobSnapshot:
    """Every text of it is ``text``."""
    return JobSnapshot(
        name=text,
        message=text,
        dataset=text,
        refused={text: 1},
        workers=(WorkerSnapshot(peer=text, state=text),),
        held=(LeaseSnapshot(text, text, "train"),),
        connections=(ConnectionSnapshot(text, text, roles=(text,)),),
        warnings=(LogLine(1, 1_700_000_000.0, "warn", "hypha", text, text),),
    )


def on_terminal(show: Callable[[Console], None]) -> str:
    file = io.StringIO()
    show(Console(file=file, width=200, force_terminal=True, color_system=None))
    return file.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_job_is_shown_as_it_is_written(text: str) -> None:
    shown = on_terminal(lambda console: console.print(status_panel(job(text))))
    assert "\x1b[2J" not in shown
    # name, message, worker, its state, lease, its worker, node, role, path, reason, warning, its peer
    assert shown.count(text.replace("\x1b", "\ufffd")) == 12


@pytest.mark.parametrize("text", HOSTILE)
def test_the_demo_shows_a_job_as_it_is_written(text: str) -> None:
    shown = on_terminal(lambda console: Show(console, None).job(job(text)))
    assert shown.count(text.replace("\x1b", "\ufffd")) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_a_probed_node_is_shown_as_it_is_written(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = HealthReport(
        healthy=True, component=text, version=text, peer=text, uptime_s=1.0, details={text: text}
    )
    show_report(text, Found(report, "", text, frozenset({text})))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    # roles, peer, organisation, component, version, and below address, peer, a detail and its name
    assert out.count(text.replace("\x1b", "\ufffd")) == 9

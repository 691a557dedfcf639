"""What peers have written stands in the terminal as it is: no markup, nothing that controls a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from hypha.cli.job.status import headline, live_view, status_panel
from hypha.cli.probing import Found, show_report
from hypha.features import features_of
from hypha.messages import HealthReport
from hypha.node import ConnectionInfo
from hypha.scheduler.status.snapshot import (
    ConnectionSnapshot,
    JobSnapshot,
    LeaseSnapshot,
    LogLine,
    ServiceSnapshot,
    WorkerSnapshot,
)

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
        version="1.0.0",
        services=(ServiceSnapshot("gateway", "peer", "", text),),
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
    # name, message, worker, its state, lease, its worker, node, role, path, reason, warning, its peer, and
    # a gateway's version
    assert shown.count(text.replace("\x1b", "\ufffd")) == 13


@pytest.mark.parametrize("text", HOSTILE)
def test_a_job_is_followed_as_it_is_written(text: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    with live_view(console, headline) as show:
        show(job(text))
    # name and message in a line, and the name at the end
    assert console.file.getvalue().count(text.replace("\x1b", "\ufffd")) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_probed_node_is_shown_as_it_is_written(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = HealthReport(
        healthy=True, component=text, version=text, peer=text, uptime_s=1.0, details={text: text}
    )
    connection = ConnectionInfo(text, text, "direct", "outbound", frozenset({text}), organization=text)
    show_report(text, Found(report, connection))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    # roles, peer, organisation, component, version, and below address, peer, a detail and its name
    assert out.count(text.replace("\x1b", "\ufffd")) == 9


@pytest.mark.parametrize(
    ("version", "features", "told", "lacks"),
    [
        ("0.0.9", (), "lacks", "finds-doubles"),
        ("9.0.0", (*features_of("hypha-gateway"), "later"), "features", "later"),
    ],
)
def test_a_probe_and_the_status_tell_what_a_gateway_can_do(
    version: str,
    features: tuple[str, ...],
    told: str,
    lacks: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = HealthReport(
        healthy=True, component="hypha-gateway", version=version, peer="p", uptime_s=1.0, features=features
    )
    show_report("an address", Found(report))
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    found = {row[0]: row[1] for row in rows if len(row) == 2}
    assert lacks in found[told]
    assert len({"lacks", "features"} & found.keys()) == 1
    service = ServiceSnapshot("gateway", "p" * 20, "gw-1", version, features)
    panel = status_panel(JobSnapshot("digits", version="1.0.0", services=(service,)))
    assert f"gateway gw-1 (…pppppppp) runs {version}" in on_terminal(lambda console: console.print(panel))

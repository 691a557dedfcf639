"""README's by-hand route, to the letter: every ``sh`` block, those marked ``terminal`` beside the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hypha.cli.local.network import free_port

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```sh( terminal)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def script(text: str) -> str:
    """One bash script; a terminal is a background job with a log of its own."""
    lines = ["set -euo pipefail"]
    for number, (terminal, commands) in enumerate(BLOCK.findall(text)):
        lines.append(f"( {commands.strip()} ) > terminal-{number}.log 2>&1 &" if terminal else commands)
    return "\n".join(lines)


def close_terminals(group: int) -> None:
    """All are in bash's group: ask, and after the 5 s that a component may take, kill."""
    deadline = time.monotonic() + 6
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


def test_the_readme_names_what_it_promises() -> None:
    text = script(README.read_text())
    for program in ("certutil root", "certutil org", "certutil node", "data prepare", "scheduler run"):
        assert f"hypha-{program}" in text
    assert text.count("> terminal-") == 4


@pytest.mark.real
@pytest.mark.timeout(400)
def test_the_by_hand_route(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    # the only change: somebody else may be on port 8080 here
    commands = script(README.read_text()).replace("/tcp/8080", f"/tcp/{free_port()}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HYPHA_")}
    bash = subprocess.Popen(
        ["bash", "-c", commands],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    try:
        output, _ = bash.communicate(timeout=380)
    finally:
        close_terminals(bash.pid)
    logs = {path.name: path.read_text()[-2000:] for path in (tmp_path / "by-hand").glob("terminal-*.log")}
    assert bash.returncode == 0, (output[-4000:], logs)
    assert json.loads(output.strip().splitlines()[-1])["accuracy"] > 0.8

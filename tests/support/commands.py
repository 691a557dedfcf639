"""Commands that start many processes themselves: whatever becomes of the test, they are asked to end all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def hypha_in(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``hypha arguments`` in that directory, with temporary files in ``tmp`` below it, which is there."""
    command = subprocess.Popen(
        [sys.executable, "-m", "hypha.cli.hypha", *arguments],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield command
    finally:
        if command.poll() is None:
            command.send_signal(signal.SIGINT)
        try:
            command.communicate(timeout=40)
        finally:
            command.kill()

"""Where a throw-away network is kept: its directory, its environment, its executor host, and scikit-learn's
digits, prepared in it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from hypha.cli.demo import files
from hypha.cli.demo.children import Children, DemoFailed
from hypha.config.environment import child_environment, process_environment
from hypha.worker.jobs.directory import MAX_SOCKET_PATH_BYTES

#: Its name among the network's processes.
HOST = "executor-host"
#: Longest path of a directory for sockets, in bytes.
MAX_TEMPORARY = 70


@asynccontextmanager
async def open_directory(name: str, directory: Path | None, keep: bool) -> AsyncIterator[Path]:
    """An empty directory: the one asked for, which stays, or a temporary one, which goes unless ``keep``."""
    if directory is not None:
        yield _empty(directory)
        return
    root = Path(tempfile.mkdtemp(prefix=f"hypha-{name}-"))
    try:
        yield root
    finally:
        if keep:
            print(f"kept {root}")
        else:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(shutil.rmtree, root)


def _empty(directory: Path) -> Path:
    root = directory.absolute()
    if root.exists() and any(root.iterdir()):
        raise DemoFailed(f"{root} is not empty; choose a new directory with --dir", 2)
    root.mkdir(parents=True, exist_ok=True)
    return root


def clean_environment(place: files.DemoFiles) -> dict[str, str]:
    """Nothing of the user's own Hypha set-up, nothing written outside the directory."""
    for name in ("tmp", "cache"):
        place[name].mkdir(exist_ok=True)
    inherited = {
        name: value
        for name, value in process_environment().items()
        if not name.startswith(("HYPHA_", "OTEL_")) and name != "RUST_LOG"
    }
    # a Unix socket's path has 107 bytes at most: in a deep directory the user's own TMPDIR must do
    if len(os.fsencode(place["tmp"])) <= MAX_TEMPORARY:
        inherited["TMPDIR"] = str(place["tmp"])
    return {
        **inherited,
        "HF_HOME": str(place["cache"]),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


async def start_host(root: Path, group: Children) -> Path | None:
    """One executor host for all workers of the network; its socket. None where the path would be too long: a
    host for each would take more memory than the executors save time.
    """
    path = root / "host" / "host.sock"
    if sys.platform != "linux" or len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        return None
    await group.start(
        HOST,
        "hypha.executor.host",
        "--socket",
        str(path),
        # as executors have it, or it could not fork any
        environment=child_environment(group.environment),
        needed=False,
    )
    return path


def warm_keys(host: Path | None) -> dict[str, Any]:
    """The configuration keys of a worker that uses that host."""
    return {"warm": False} if host is None else {"warm_host": str(host)}


async def prepare_digits(place: files.DemoFiles, group: Children) -> None:
    """Run `hypha-data prepare` on what :func:`files.write_digits` has written."""
    await group.run(
        "prepare",
        "hypha.cli.data",
        "prepare",
        str(place["raw"]),
        *("--output", str(place["dataset"])),
        *("--name", files.DATASET),
        *("--slice-samples", str(files.SLICE_SAMPLES)),
        *("--holdout", str(files.HOLDOUT)),
        *("--holdout-output", str(place["held-out"])),
    )

"""One executor host and one node host for all networks of a test run, started by the first that wants one.

The executor host's environment is that of every executor: a directory of this run as the cache of Hugging
Face, and the tests themselves on the path.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from hypha.cli.local.node_host import NodeHost
from hypha.config.environment import child_environment, process_environment

ROOT = Path(__file__).parent.parent.parent


@cache
def run_directory() -> Path:
    """A private directory, gone with this process."""
    made = Path(tempfile.mkdtemp(prefix="hypha-host-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def run_environment() -> Mapping[str, str]:
    """For nodes: nothing of the user's own set-up, nothing fetched; the tests on the path."""
    environment = {
        name: value
        for name, value in process_environment().items()
        if not name.startswith(("HYPHA_", "OTEL_")) and name != "RUST_LOG"
    }
    found = environment.get("PYTHONPATH")
    return {
        **environment,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(run_directory() / "hub"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([found] if found else [])]),
    }


@cache
def shared_host() -> Path:
    """The socket of a running host; it may still be importing."""
    path = run_directory() / "host.sock"
    log = (run_directory() / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hypha.executor.host", "--lifeline", "--socket", str(path)],
        stdin=subprocess.PIPE,
        stdout=log,
        env=child_environment(run_environment()),
        start_new_session=True,
    )

    def end() -> None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        log.close()

    atexit.register(end)
    while not path.exists():
        assert process.poll() is None, (run_directory() / "log").read_text()
        time.sleep(0.01)
    return path


@cache
def shared_node_host() -> NodeHost:
    """A host that forks the nodes of all networks; it may still be importing."""
    host = NodeHost(run_directory() / "node-host.log", run_environment())
    atexit.register(host.close)
    return host

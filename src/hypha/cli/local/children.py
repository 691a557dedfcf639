"""The network's processes: started in groups of their own, watched, and always ended.

Each writes its log to a file, so that what a process logged last can be shown when it fails. None outlives
the :func:`children` block: SIGTERM first, SIGKILL to the whole group after ``GRACE_S``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hypha.cli.local.node_host import ForkedNode, NodeHost
from hypha.errors import HyphaError

#: A component stops within 5 s of SIGTERM.
GRACE_S = 6.0
TAIL_LINES = 15


class NetworkFailed(HyphaError):
    """A process did not do what it should have done by then; the message has the end of its log."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass
class Child:
    name: str
    process: trio.Process | ForkedNode
    log: Path
    #: nothing can go on without it
    needed: bool = True
    #: extra fields of its log entries so far, the last value of each
    fields: dict[str, object] = field(default_factory=dict)
    _read: int = 0
    _rest: bytes = b""

    def look(self) -> dict[str, object]:
        """Read on in its log; what its entries have held so far (``addresses``, ``http_address`` ...)."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            data = self._rest + file.read()
            self._read = file.tell()
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                self.fields.update(entry)
        return self.fields

    def tail(self) -> str:
        """The last lines of its log, as people read them."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(f"    {_readable(line)}" for line in lines)


def _readable(line: str) -> str:
    try:
        entry = json.loads(line)
        return f"{entry['level']:5} {entry['message']}"
    except (ValueError, KeyError, TypeError):
        return line


class Children:
    """Starts and watches; made by :func:`children`. ``node_host`` forks nodes where it can do that."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], node_host: NodeHost | None = None
    ) -> None:
        self._node_host = node_host
        self._logs = directory / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self.environment = dict(environment)
        self.running: list[Child] = []

    async def start(
        self,
        name: str,
        module: str,
        *arguments: str,
        prefix: Sequence[str] = (),
        network_namespace: str | None = None,
        environment: Mapping[str, str] | None = None,
        needed: bool = True,
    ) -> Child:
        """Run ``python -m module arguments``; its output goes to ``logs/<name>.log``.

        ``prefix`` is a command that runs another one in its own place, such as ``env A=B``; in a
        ``network_namespace`` both do. Without ``needed`` nobody minds its end.
        """
        log = self._logs / f"{name}.log"
        variables = self.environment if environment is None else dict(environment)
        inside = () if network_namespace is None else ("ip", "netns", "exec", network_namespace)
        # shielded, so that no process can start without being on the list
        with log.open("wb") as file, trio.CancelScope(shield=True):
            process: trio.Process | ForkedNode | None = None
            if self._node_host is not None and not prefix:
                process = await self._node_host.fork(
                    module, arguments, variables, file.fileno(), network_namespace
                )
            if process is None:
                process = await trio.lowlevel.open_process(
                    [*inside, *prefix, sys.executable, "-m", module, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env=variables,
                    # Ctrl-C in the terminal goes to the demo alone, which ends the others in order
                    start_new_session=True,
                )
            child = Child(name, process, log, needed)
            self.running.append(child)
        await trio.lowlevel.checkpoint()
        return child

    async def run(self, name: str, module: str, *arguments: str) -> str:
        """Run to the end and return its output. Raises NetworkFailed unless it exits with 0."""
        child = await self.start(name, module, *arguments)
        code = await child.process.wait()
        self.running.remove(child)
        if code:
            raise NetworkFailed(f"{name} failed with exit code {code}:\n{child.tail()}", max(code, 1))
        return child.log.read_text(errors="replace")

    def check(self, *allowed: Child) -> None:
        """Raise NetworkFailed when a process that should run for ever has ended."""
        for child in self.running:
            code = child.process.poll()
            if code is not None and child.needed and child not in allowed:
                raise NetworkFailed(
                    f"{child.name} ended with exit code {code}; the end of its log:\n{child.tail()}",
                    code if code > 0 else 1,
                )

    async def stop(self, chosen: Sequence[Child] | None = None) -> None:
        """End processes (all of them): SIGTERM, then SIGKILL to what is left."""
        ending = list(self.running if chosen is None else chosen)
        for child in ending:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(GRACE_S):
            for child in ending:
                await child.process.wait()
        for child in ending:
            # what it left behind in its group; it led it, so no other group can have this number
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
            await child.process.wait()
            if child in self.running:
                self.running.remove(child)


@asynccontextmanager
async def children(
    directory: Path, environment: Mapping[str, str], node_host: NodeHost | None = None
) -> AsyncIterator[Children]:
    """Processes that are all gone when the block ends. Without a ``node_host`` they have their own."""
    with ExitStack() as stack:
        if node_host is None and sys.platform == "linux":
            node_host = NodeHost(directory / "logs" / "node-host.log", environment)
            stack.callback(node_host.close)
        group = Children(directory, environment, node_host)
        try:
            yield group
        finally:
            with trio.CancelScope(shield=True):
                await group.stop()

"""The keeper of one executor as its worker sees it: started with the executor, or forked by a host.

Both are used alike. A keeper's process group is that of its executor, its output theirs; it runs as long as
anything of the executor does, and ends as the executor did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from hypha.messages import ExecutorClass
from hypha.processes import keeper

KEEPER = Path(keeper.__file__)
#: After SIGKILL a process is gone at once, but for one stuck in the kernel.
KILLED_WITHIN_S = 2.0
#: Longer lines of output are cut.
MAX_LINE_BYTES = 4096


async def each_line(output: trio.abc.ReceiveStream, say: Callable[[str], None]) -> None:
    """Call ``say`` for each line of ``output``, until it ends; cancelled, for what was read of the last."""
    rest = b""
    try:
        async for data in output:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                say(_text(line))
            while len(rest) > MAX_LINE_BYTES:
                say(_text(rest))
                rest = rest[MAX_LINE_BYTES:]
    finally:
        if rest:
            say(_text(rest))


def _text(line: bytes) -> str:
    return line[:MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r")


@dataclass(frozen=True)
class Launch:
    """Everything to start an executor with. ``secrets`` are blotted out of its output."""

    job_id: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    work_dir: Path
    keeper_options: Sequence[str] = ()
    secrets: tuple[str, ...] = ()
    #: where ``argv`` is ``python -m module ...`` of Hypha's own: that module, which a host may fork
    own: str = ""
    #: it does without transformers
    torch_only: bool = False
    kind: ExecutorClass = "train"
    #: below a program that exits with 128 + N of a signal N, as shells do
    isolated: bool = False
    #: gets the keeper's PID once there is a keeper
    on_start: Callable[[int], None] | None = None


class Keeper(ABC):
    """A running keeper, which holds ``lifeline``; ``output`` is what the executor and its children write."""

    #: that of its process group, too; 0 before it runs
    pid = 0
    #: its exit code, negative: the signal that killed it; None while it runs
    code: int | None = None

    def __init__(self, lifeline: trio.abc.SendStream, output: trio.abc.ReceiveStream) -> None:
        self._lifeline = lifeline
        self.output = output

    @abstractmethod
    async def wait(self) -> None:
        """Until it has ended, and :attr:`code` is known."""

    async def end(self) -> None:
        """Cut the lifeline: it kills everything below it, and ends. If it does not, kill its group."""
        if self.code is not None:
            return
        await self._lifeline.aclose()
        # a keeper that somebody stopped could not keep its promise
        self.signal_group(signal.SIGCONT)
        with trio.move_on_after(KILLED_WITHIN_S):
            await self.wait()
            return
        self.signal_group(signal.SIGKILL)
        with trio.move_on_after(KILLED_WITHIN_S):
            await self.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """To itself, its executor and who stayed in its group; nothing happens once it has ended."""
        if self.code is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def aclose(self) -> None:
        """Once it has ended: let go of pipes."""
        await self._lifeline.aclose()
        await self.output.aclose()


class StartedKeeper(Keeper):
    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        super().__init__(process.stdin, process.stdout)
        self._process = process
        self.pid = process.pid

    async def wait(self) -> None:
        self.code = await self._process.wait()


async def start_keeper(launch: Launch) -> StartedKeeper:
    """Start the executor under a keeper of its own. Raises OSError."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-I", "-S", str(KEEPER), *launch.keeper_options, "--", *launch.argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=launch.work_dir,
        env=dict(launch.environment),
        start_new_session=True,
    )
    return StartedKeeper(process)

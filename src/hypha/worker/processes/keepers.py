"""The keeper of one executor as its worker sees it: started with the executor, or forked by a host.

Both are used alike. A keeper's process group is that of its executor, its output theirs; it runs as long as
anything of the executor does, and ends as the executor did.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from hypha.messages import ExecutorClass
from hypha.processes import keeper

KEEPER = Path(keeper.__file__)
#: After SIGKILL a process is gone at once, but for one stuck in the kernel.
KILLED_WITHIN_S = 2.0


@dataclass(frozen=True)
class OwnExecutor:
    """That an executor is one of Hypha's own: its module, and whether it does without transformers."""

    module: str
    torch_only: bool = False


@dataclass(frozen=True)
class Launch:
    """Everything to start an executor with. ``secrets`` are blotted out of its output."""

    job_id: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    work_dir: Path
    keeper_options: Sequence[str] = ()
    secrets: tuple[str, ...] = ()
    #: where ``argv`` is ``python -m module ...`` of Hypha's own: a host may fork it
    own: OwnExecutor | None = None
    kind: ExecutorClass = "train"
    #: below a program that exits with 128 + N of a signal N, as shells do
    isolated: bool = False
    #: fields of the log entry of each line of its output, as they are when it is written
    output_fields: Callable[[], Mapping[str, object]] | None = None
    #: gets the keeper's PID once there is a keeper
    on_start: Callable[[int], None] | None = None


class Keeper(Protocol):
    """A running keeper."""

    @property
    def pid(self) -> int:
        """Its PID, and that of its process group."""

    @property
    def output(self) -> trio.abc.ReceiveStream:
        """What the executor and its children write."""

    @property
    def code(self) -> int | None:
        """Its exit code, negative: the signal that killed it; None while it runs."""

    async def wait(self) -> None:
        """Until it has ended."""

    async def cut_lifeline(self) -> None:
        """Let it kill everything below it, and end."""

    def signal_group(self, number: signal.Signals) -> None:
        """To itself, its executor and who stayed in its group; nothing happens once it has ended."""

    async def aclose(self) -> None:
        """Once it has ended: let go of pipes."""


class StartedKeeper:
    """One that is a child process of the worker."""

    def __init__(self, process: trio.Process, lifeline: trio.abc.SendStream, output: trio.abc.ReceiveStream):
        self._process = process
        self._lifeline = lifeline
        self.output = output

    @property
    def pid(self) -> int:
        """See :class:`Keeper`."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """See :class:`Keeper`."""
        return self._process.poll()

    async def wait(self) -> None:
        """See :class:`Keeper`."""
        await self._process.wait()

    async def cut_lifeline(self) -> None:
        """See :class:`Keeper`."""
        await self._lifeline.aclose()

    def signal_group(self, number: signal.Signals) -> None:
        """See :class:`Keeper`."""
        if self._process.poll() is None:
            signal_group(self.pid, number)

    async def aclose(self) -> None:
        """See :class:`Keeper`."""
        await self._lifeline.aclose()
        await self.output.aclose()


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
    assert process.stdin is not None
    assert process.stdout is not None
    return StartedKeeper(process, process.stdin, process.stdout)


async def end_keeper(keeper: Keeper) -> None:
    """Cut the lifeline: the keeper kills everything below it. If it does not, kill its group."""
    if keeper.code is not None:
        return
    await keeper.cut_lifeline()
    # a keeper that somebody stopped could not keep its promise
    keeper.signal_group(signal.SIGCONT)
    with trio.move_on_after(KILLED_WITHIN_S):
        await keeper.wait()
        return
    keeper.signal_group(signal.SIGKILL)
    with trio.move_on_after(KILLED_WITHIN_S):
        await keeper.wait()


def signal_group(group: int, number: signal.Signals) -> None:
    """Nothing happens when it is gone."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return

"""What is left of an executor whose keeper was killed: adopted by the worker, found, and ended.

An executor runs as the worker's user, so it can kill its keeper, and children of it that have left its
session would run on as nobody's. As the worker is a child subreaper (prctl(2)), the kernel makes them the
worker's children. Whatever the worker starts itself shares its session, or is known here: any other child is
one of these.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection

import trio

from hypha.processes import keeper

logger = logging.getLogger("hypha.worker.executor")

#: After SIGKILL a process is gone at once, but for one stuck in the kernel.
GONE_WITHIN_S = 2.0
_ENDING_S = 0.1


class Orphans:
    """``known``: the PIDs of keepers and hosts that run now. One is registered there while ``starting`` is
    held, so that it is never taken for an orphan.
    """

    def __init__(self, known: Callable[[], Collection[int]]) -> None:
        self._known = known
        self.starting = trio.Lock()

    def adopt(self) -> None:
        """From now on this process adopts them. Raises OSError."""
        keeper.become_subreaper()

    async def end(self) -> None:
        """Kill those that there are, with all below them, and wait until they are gone."""
        async with self.starting:
            ended: set[int] = set()
            if self._reap():
                # a keeper whose host has ended is our child, too, and about to end when it reports that
                await trio.sleep(_ENDING_S)
            with trio.move_on_after(GONE_WITHIN_S):
                while found := self._reap():
                    ended.update(found)
                    for pid in (*found, *(below for one in found for below in keeper.descendants(one))):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    await trio.sleep(0.01)
        if ended:
            logger.warning(
                "An executor's keeper was killed; processes %s, which it left behind, were ended.",
                ", ".join(map(str, sorted(ended))),
            )

    def _reap(self) -> list[int]:
        """Those that there are, without those that have ended."""
        known, session = frozenset(self._known()), os.getsid(0)
        found = []
        for pid in keeper.children(os.getpid()):
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                if pid in known or os.getsid(pid) == session:
                    continue
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    found.append(pid)
        return found

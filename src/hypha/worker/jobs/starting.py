"""How an executor is run: as a process behind its bridge, or as whatever a :class:`RunExecutor` makes of it.

A worker is given one of these; a simulated world gives it executors that live in the world's own loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from hypha.worker.bridge.server import BridgeHandlers, bind_bridge, serve_bridge
from hypha.worker.bridge.spans import EmitSpans
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, Supervision, run_executor


@dataclass(frozen=True)
class EndSignals:
    """How an executor is ended: politely once ``stop`` is set, within ``grace_s``; at once with ``kill``."""

    stop: trio.Event
    grace_s: float
    kill: trio.Event


#: runs one executor, which may ask the handlers, until it has ended; cancelled, nothing of it is left
RunExecutor = Callable[[BridgeHandlers, Path, Launch, EndSignals], Awaitable[Exit]]


async def run_process(
    handlers: BridgeHandlers,
    socket_path: Path,
    launch: Launch,
    ends: EndSignals,
    supervision: Supervision | None = None,
) -> Exit:
    """A process with its bridge at ``socket_path``. Raises OSError when there can be no socket."""
    listener = bind_bridge(socket_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_bridge, handlers, listener)
        ended = await run_executor(launch, ends.stop, ends.grace_s, kill=ends.kill, supervision=supervision)
        nursery.cancel_scope.cancel()
    return ended


@dataclass(frozen=True)
class ExecutorBackend:
    """Runs a worker's executors; ``emit_spans`` exports their spans. Without, they are not asked for any."""

    run: RunExecutor = run_process
    emit_spans: EmitSpans | None = None

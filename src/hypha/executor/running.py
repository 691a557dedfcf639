"""How an executor process starts and ends: its bridge, its log, its exit code, its last words."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

from opentelemetry import trace

from hypha.errors import (
    BatchFailed,
    CheckpointUnusable,
    DataError,
    HyphaError,
    ModelError,
    NotFinite,
    Refused,
)
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.bridge.spans import SpanRecorder, Traces
from hypha.executor.inner.batch_size import is_out_of_memory
from hypha.executor.threads import finish
from hypha.files.disks import is_disk_full
from hypha.messages import ExecutorError, Job

logger = logging.getLogger("hypha.executor")

#: how long the last words may take; a worker that stops an executor is patient for about as long
FLUSH_S = 3.0
#: the last ones of a traceback say most
_TRACE_CHARACTERS = 1500
#: how long the last spans may take
_SPANS_S = 1.0
#: of errors, the first that fits
_KINDS = (
    (NotFinite, "not-finite"),
    (ModelError, "model"),
    (CheckpointUnusable, "checkpoint"),
    (BatchFailed, "batch"),
    (DataError, "data"),
)


def run_executor(socket: Path, work: Callable[[BridgeClient], Coroutine[Any, Any, None]]) -> int:
    """Run ``work`` in the current directory, the job's; the exit code. What it raises is logged, and reported
    to the scheduler.
    """
    set_up_log()
    bridge = BridgeClient(socket.absolute(), Path.cwd())
    code = 0
    try:
        finish(work(bridge))
    except Exception as exc:
        logger.exception("The executor cannot go on.")
        bridge.report(last_words(exc))
        code = exit_code_of(exc)
    bridge.flush(FLUSH_S)
    if isinstance(recorder := trace.get_tracer_provider(), SpanRecorder):
        recorder.flush(_SPANS_S)
    return code


def set_up_log() -> None:
    """To the executor's output, which its worker reads."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def last_words(exc: Exception) -> ExecutorError:
    """Why an executor cannot go on, for the scheduler."""
    text = str(exc) if isinstance(exc, HyphaError) else f"{type(exc).__name__}: {exc}"
    kind = kind_of(exc)
    if kind == "oom":
        text += "; the job should ask for more memory (resources.worker.memory) or take smaller batches"
    if kind == "batch":
        # the line that says what to change comes first; what a developer needs follows
        lines = "".join(traceback.format_exception(exc.__cause__ or exc)).rstrip()
        text += f"\n{lines[-_TRACE_CHARACTERS:]}"
    return ExecutorError(kind=kind, message=text)


def exit_code_of(exc: Exception) -> int:
    return exc.exit_code if isinstance(exc, HyphaError) else 1


def begin_traces(bridge: BridgeClient, job: Job) -> Traces:
    """From now on spans of this process are recorded, and handed to the worker, if ``job`` is traced."""
    if job.traced is not None:
        recorder = SpanRecorder(bridge.post_spans)
        bridge.after_event = recorder.post_waiting
        trace.set_tracer_provider(recorder)
    return Traces(job)


def kind_of(exc: BaseException) -> str:
    for error, kind in _KINDS:
        if isinstance(exc, error):
            return kind
    if is_disk_full(exc) or (isinstance(exc, Refused) and exc.code == "no-space"):
        return "disk"
    if is_out_of_memory(exc):
        return "oom"
    return "internal"


def leave(code: int) -> NoReturn:
    """End the process now: its daemon threads may sit in calls that take for ever, and tearing an
    interpreter down around them is how a clean end becomes a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

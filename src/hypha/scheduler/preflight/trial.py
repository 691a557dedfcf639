"""The scheduler's end of a trial: a child process, as the scheduler itself never imports torch.

It is started before the dataset is looked up, so that its imports take nobody's time, and is gone when the
block of :func:`open_trial` ends. No device is opened, and nothing is fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from hypha.config.environment import process_environment
from hypha.decoding import decode_json
from hypha.errors import Undecodable
from hypha.messages import Trial, TrialReport

logger = logging.getLogger(__name__)

#: a report is a few sentences
_MAX_REPORT_BYTES = 1 << 20
_ENVIRONMENT = {
    # neither a model nor its tokenizer may be looked for on the network: that takes time
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
}


class ModelTrial:
    """Of a job whose ``model.type`` is ``task``; one child process at a time. Made by :func:`open_trial`."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._child: trio.Process | None = None

    async def start(self) -> None:
        """Have what it needs imported. Does nothing where torch is not installed."""
        if importlib.util.find_spec("torch") is None:
            return
        self._child = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "hypha.executor.trial", self._task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # an interrupt from the terminal is the scheduler's affair
            start_new_session=True,
            env={**process_environment(), **_ENVIRONMENT},
        )

    async def run(self, trial: Trial, timeout_s: float) -> TrialReport:
        """What comes of it, once, within ``timeout_s``; whatever goes wrong with the child is ``unknown``."""
        if self._child is not None and self._child.poll() is not None:
            # it was waiting for too long
            await self.close()
            await self.start()
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            reason = "torch is not installed on this machine (pip install 'hypha-train[train]')"
            return TrialReport(outcome="unknown", reason=reason)
        text = bytearray()
        with trio.move_on_after(timeout_s) as scope:
            try:
                await child.stdin.send_all(msgspec.json.encode(trial) + b"\n")
                while not text.endswith(b"\n") and len(text) < _MAX_REPORT_BYTES:
                    if not (piece := await child.stdout.receive_some()):
                        break
                    text += piece
            except (trio.BrokenResourceError, OSError) as exc:
                logger.debug("The trial's process: %s", exc)
        if scope.cancelled_caught:
            return TrialReport(outcome="unknown", reason=f"it took longer than {timeout_s:g} s")
        try:
            return decode_json(bytes(text), TrialReport)
        except Undecodable:
            with trio.move_on_after(1.0):
                await child.wait()
            reason = f"the process that was to try it ended with exit code {child.returncode}"
            return TrialReport(outcome="unknown", reason=reason)

    async def close(self) -> None:
        """End the child, and what it started."""
        child, self._child = self._child, None
        if child is None:
            return
        with trio.CancelScope(shield=True):
            # it leads a session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    await stream.aclose()


@asynccontextmanager
async def open_trial(task: str | None) -> AsyncIterator[ModelTrial | None]:
    """A trial of a model of that task, whose child is starting; ``None`` without a task."""
    if task is None:
        yield None
        return
    trial = ModelTrial(task)
    try:
        await trial.start()
        yield trial
    finally:
        await trial.close()

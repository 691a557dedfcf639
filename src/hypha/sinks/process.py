"""The scheduler's end of a metric sink: a task that feeds the sink's process.

Whoever has figures never waits. A sink that fails, ends or gives no reply is ended and started again after a
pause; meanwhile up to ``KEPT`` rounds wait, then the oldest are dropped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections import deque

import msgspec
import trio

from hypha.backoff import NO_JITTER, Backoff
from hypha.sinks.interface import Begin, Destination, RoundValues, RunInfo

logger = logging.getLogger(__name__)

#: rounds that wait for a sink that does not work
KEPT = 1000
#: a sink that has not replied for so long hangs
PATIENCE_S = 60.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
#: a process that was killed is waited for
_KILLED_S = 0.3


class _FailedError(Exception):
    """The sink did not do what it was told; says why."""


class SinkProcess:
    """One sink of one run. :meth:`run` feeds it; its process starts with the first round."""

    def __init__(self, destination: Destination, run: RunInfo, *, patience_s: float = PATIENCE_S) -> None:
        self._type = destination.type
        self._begin = Begin(destination, run)
        self._patience_s = patience_s
        self._waiting: deque[RoundValues] = deque()
        self._changed = trio.Event()
        self._closing = trio.Event()
        # whoever is cancelled closes it, which takes its own time
        self._scope = trio.CancelScope(shield=True)
        #: rounds that the sink never got
        self.dropped = 0
        self._failing = False
        self._backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, jitter=NO_JITTER)
        self._child: trio.Process | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, values: RoundValues) -> None:
        """Have ``values`` recorded."""
        if len(self._waiting) >= KEPT:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(values)
        self._changed.set()

    def close(self, timeout_s: float) -> None:
        """Have :meth:`run` record what waits, close the sink and end, by then at the latest."""
        self._scope.deadline = trio.current_time() + timeout_s
        self._closing.set()
        self._changed.set()

    async def run(self) -> None:
        """Feed the sink until it is closed. No cancellation ends that, and no error here ends the job."""
        try:
            with self._scope:
                await self._feed()
            if self._scope.cancelled_caught:
                logger.warning("The metric sink %s did not finish in time.", self._type)
            await self._end_child()
        except Exception:  # the edge of a service
            logger.exception("The metric sink %s failed.", self._type)
        self.dropped += len(self._waiting)
        self._waiting.clear()
        if self.dropped:
            logger.warning("The metric sink %s lacks %d rounds.", self._type, self.dropped)

    async def _feed(self) -> None:
        while self._waiting or not self._closing.is_set():
            if not self._waiting:
                self._changed = trio.Event()
                await self._changed.wait()
                continue
            values = self._waiting[0]
            try:
                await self._deliver(values)
            except Exception as exc:  # noqa: BLE001 - the edge of a service, whatever its process does
                await self._failed(exc)
                if self._closing.is_set():
                    return  # nobody waits for another try
            else:
                self._worked(values)
        if self._child is not None:
            try:
                await self._ask(None)
            except Exception as exc:  # noqa: BLE001 - as above
                logger.warning("The metric sink %s was not closed: %s.", self._type, exc)

    def _worked(self, values: RoundValues) -> None:
        # it may have been dropped meanwhile
        if self._waiting and self._waiting[0] is values:
            self._waiting.popleft()
        self._backoff.reset()
        if self._failing:
            self._failing = False
            logger.warning(
                "The metric sink %s works again; %d rounds are missing there.", self._type, self.dropped
            )

    async def _failed(self, exc: Exception) -> None:
        await self._end_child()
        if not self._failing:
            self._failing = True
            logger.warning(
                "The metric sink %s does not work: %s. It is tried again, and %d rounds are kept for it.",
                self._type,
                exc,
                KEPT,
            )
        with trio.move_on_after(self._backoff.next_s()):
            await self._closing.wait()

    async def _deliver(self, values: RoundValues) -> None:
        if self._child is None:
            self._child = await trio.lowlevel.open_process(
                [sys.executable, "-m", "hypha.sinks.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # an interrupt from the terminal is the scheduler's affair; a library's own processes end
                # with it
                start_new_session=True,
            )
            await self._ask(self._begin)
        await self._ask(values)

    async def _ask(self, what: Begin | RoundValues | None) -> None:
        """Have it do ``what``, or close, with None. Raises :class:`_FailedError`."""
        stdio = None if self._child is None else self._child.stdio
        if stdio is None:
            raise _FailedError("its process has no pipes")
        try:
            with trio.fail_after(self._patience_s):
                if what is None:
                    await stdio.send_stream.aclose()
                else:
                    await stdio.send_all(msgspec.json.encode(what) + b"\n")
                text = b""
                while not text.endswith(b"\n"):
                    if not (piece := await stdio.receive_some()):
                        raise _FailedError("its process ended")
                    text += piece
        except trio.TooSlowError:
            raise _FailedError(f"it gave no reply for {self._patience_s:g} s") from None
        except trio.BrokenResourceError as exc:
            raise _FailedError("its process ended") from exc
        if error := msgspec.json.decode(text, type=str):
            raise _FailedError(error)

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        # it leads a session, so all that it started goes along
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with trio.move_on_after(_KILLED_S, shield=True):
            if child.stdio is not None:
                await trio.aclose_forcefully(child.stdio)
            await child.wait()

"""The scheduler's end of a metric sink: a thread that feeds the sink's process.

Whoever has figures never waits. A sink that fails, ends or gives no reply is ended and started again after a
pause; meanwhile up to ``KEPT`` rounds wait, then the oldest are dropped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable

import msgspec
import trio

from hypha.backoff import NO_JITTER, Backoff
from hypha.runtime import in_thread
from hypha.sinks.interface import Begin, Destination, Reply, RoundValues, RunInfo

logger = logging.getLogger(__name__)

#: rounds that wait for a sink that does not work
KEPT = 1000
#: a sink that has not replied for so long hangs
PATIENCE_S = 60.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_LOOK_S = 0.05
#: to kill what did not end
_SLACK_S = 0.3


class _FailedError(Exception):
    """The sink did not do what it was told; says why."""


class SinkProcess:
    """One sink of one run; its thread starts at once, its process with the first round."""

    def __init__(self, destination: Destination, run: RunInfo, *, patience_s: float = PATIENCE_S) -> None:
        self.destination = destination
        self._begin = Begin(destination, run)
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._waiting: deque[RoundValues] = deque()
        self._closing_at: float | None = None
        #: rounds that the sink never got
        self.dropped = 0
        self._failing = False
        self._backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S, jitter=NO_JITTER)
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name=f"sink {destination.type}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until it has ended, after :meth:`close`; false when it has not. Blocks."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, values: RoundValues) -> None:
        """Have ``values`` recorded. Never blocks."""
        with self._changed:
            if len(self._waiting) >= KEPT:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(values)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Record what waits, close the sink and end, by then at the latest. Returns at once."""
        with self._changed:
            self._closing_at = time.monotonic() + timeout_s
            self._changed.notify()

    def _run(self) -> None:
        """In its thread, as all below."""
        try:
            while (values := self._next()) is not None:
                try:
                    self._deliver(values)
                except (_FailedError, OSError) as exc:
                    self._failed(exc)
                else:
                    self._worked(values)
            self._finish()
        finally:
            self._end_child()
            self._tell_lost()

    def _next(self) -> RoundValues | None:
        """The oldest round that waits; it stays there until it is recorded. ``None`` at the end."""
        with self._changed:
            while not self._waiting and self._closing_at is None:
                self._changed.wait()
            return self._waiting[0] if self._waiting and not self._is_over() else None

    def _worked(self, values: RoundValues) -> None:
        with self._changed:
            # it may have been dropped meanwhile
            if self._waiting and self._waiting[0] is values:
                self._waiting.popleft()
            dropped = self.dropped
        self._backoff.reset()
        if self._failing:
            self._failing = False
            logger.warning(
                "The metric sink %s works again; %d rounds are missing there.",
                self.destination.type,
                dropped,
            )

    def _failed(self, exc: Exception) -> None:
        self._end_child()
        if not self._failing:
            self._failing = True
            logger.warning(
                "The metric sink %s does not work: %s. It is tried again, and %d rounds are kept for it.",
                self.destination.type,
                exc,
                KEPT,
            )
        until = time.monotonic() + self._backoff.next_s()
        with self._changed:
            while (left := until - time.monotonic()) > 0 and self._closing_at is None:
                self._changed.wait(left)
            if self._closing_at is not None:
                # nobody waits for another try
                self._closing_at = time.monotonic()

    def _is_over(self) -> bool:
        return self._closing_at is not None and time.monotonic() >= self._closing_at

    def _tell_lost(self) -> None:
        with self._changed:
            self.dropped += len(self._waiting)
            self._waiting.clear()
        if self.dropped:
            logger.warning("The metric sink %s lacks %d rounds.", self.destination.type, self.dropped)

    def _deliver(self, values: RoundValues) -> None:
        """Raises :class:`_FailedError`, and OSError."""
        if self._child is None:
            self._child = self._start()
            self._ask(self._child, msgspec.json.encode(self._begin))
        self._ask(self._child, msgspec.json.encode(values))

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-m", "hypha.sinks.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # an interrupt from the terminal is the scheduler's affair; a library's own processes end with it
            start_new_session=True,
        )
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
        return child

    def _ask(self, child: subprocess.Popen[bytes], line: bytes) -> None:
        if child.stdin is None or child.stdout is None:
            raise _FailedError("its process has no pipes")
        deadline = time.monotonic() + self._patience_s
        left = memoryview(line + b"\n")
        while left:
            self._wait(child.stdin.fileno(), select.POLLOUT, deadline)
            left = left[os.write(child.stdin.fileno(), left) :]
        self._reply(child.stdout.fileno(), deadline)

    def _reply(self, fd: int, deadline: float) -> None:
        text = b""
        while not text.endswith(b"\n"):
            self._wait(fd, select.POLLIN, deadline)
            piece = os.read(fd, 1 << 16)
            if not piece:
                raise _FailedError("its process ended")
            text += piece
        error = msgspec.json.decode(text, type=Reply).error
        if error:
            raise _FailedError(error)

    def _wait(self, fd: int, what: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, what)
        while not poll.poll(_LOOK_S * 1000):
            if time.monotonic() >= deadline:
                raise _FailedError(f"it gave no reply for {self._patience_s:g} s")
            if self._is_over():
                raise _FailedError("it did not finish in time")

    def _finish(self) -> None:
        child = self._child
        if child is None or child.stdin is None or child.stdout is None:
            return
        try:
            child.stdin.close()
            self._reply(child.stdout.fileno(), time.monotonic() + self._patience_s)
        except (_FailedError, OSError) as exc:
            logger.warning("The metric sink %s was not closed: %s.", self.destination.type, exc)

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        # it leads a session, so all that it started goes along
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()


async def close_all(sinks: Iterable[SinkProcess], timeout_s: float) -> None:
    """Close all of them, at the same time; they have ended when this returns, or a little later."""
    ending = tuple(sinks)
    for sink in ending:
        sink.close(timeout_s)
    if ending:
        with trio.CancelScope(shield=True):
            await in_thread(_join, ending, timeout_s + _SLACK_S)


def _join(sinks: tuple[SinkProcess, ...], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for sink in sinks:
        sink.join(max(0.0, deadline - time.monotonic()))

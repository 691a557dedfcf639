"""An executor that the run's executor host has forked, for tests that are not asynchronous: it is there at
once, where one that is started imports torch for seconds.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired
from sys import executable
from typing import BinaryIO

import msgspec
from tests.support.host import run_environment, shared_host

from hypha.config.inherited import child_environment, inherited_state
from hypha.messages import Forked, ForkReply, ForkRequest, KeeperEnded, NotForked, encode
from hypha.processes import keeper

#: A host may still be importing, on a busy machine.
_FORKED_WITHIN_S = 100.0


class ForkedExecutor:
    """``python -m module arguments`` in ``directory``; of the shape of :class:`subprocess.Popen`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        output: BinaryIO,
    ) -> None:
        request = ForkRequest(
            module=module,
            arguments=tuple(arguments),
            directory=str(directory),
            environment={**child_environment(run_environment()), **environment},
            torch_only=True,
            python=executable,
            package=keeper.__file__,
            inherited=inherited_state(),
        )
        self.returncode: int | None = None
        self._told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        held, lifeline = os.pipe()
        self._lifeline: int | None = lifeline
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.connect(str(shared_host()))
            socket.send_fds(control, [encode(request)], [theirs.fileno(), held, output.fileno()])
        os.close(held)
        match self._receive(_FORKED_WITHIN_S):
            case Forked():
                pass
            case NotForked(reason=reason):
                raise AssertionError(reason)
            case answer:
                raise AssertionError(f"the executor host has ended: {answer}")

    def _receive(self, timeout_s: float | None) -> ForkReply | None:
        self._told.settimeout(timeout_s)
        data = self._told.recv(4096)
        return msgspec.msgpack.decode(data, type=ForkReply) if data else None

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        try:
            return self.wait(0)
        except TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code."""
        if self.returncode is not None:
            return self.returncode
        try:
            ended = self._receive(timeout)
        except (TimeoutError, BlockingIOError) as exc:
            raise TimeoutExpired("executor", timeout or 0.0) from exc
        # a keeper that was killed says nothing
        status = ended.status if isinstance(ended, KeeperEnded) else int(signal.SIGKILL)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._told.close()
        self.kill()
        return self.returncode

    def kill(self) -> None:
        """End it, and all that it has started; nothing when it has ended."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

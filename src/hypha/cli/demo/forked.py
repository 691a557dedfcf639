"""Nodes that start in milliseconds: forked by a node host (:mod:`hypha.cli.demo.node_host`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from hypha.cli.demo.node_host import COMPONENTS

#: variables that the interpreter, the C library or a package reads before a fork can change them
_READ_EARLY = re.compile("PYTHON|LD_|GLIBC_|MALLOC_|LANG|LC_|SSL_|OPENSSL|OMP_|OPENBLAS|NPY_|NUMPY")
_MAX_REPLY_BYTES = 4096


class ForkedNode:
    """A node's process: of :class:`trio.Process` what those who start nodes use. ``descriptor`` is its pidfd;
    how it ended is ``told``.
    """

    def __init__(self, pid: int, descriptor: int, told: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._told = told
        self._descriptor = descriptor

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; ``None`` while it runs."""
        if self.returncode is None and _readable(self._told.fileno()):
            self._receive()
        return self.returncode

    def _receive(self) -> None:
        reply = self._told.recv(_MAX_REPLY_BYTES)
        if reply:
            self.returncode = os.waitstatus_to_exitcode(json.loads(reply)["status"])
        elif _readable(self._descriptor):
            # the host has ended before it: how it ended nobody knows
            self.returncode = -signal.SIGKILL
        else:
            return
        for closing in (self._told.fileno(), self._descriptor):
            # another task may wait for it
            with contextlib.suppress(RuntimeError):  # trio does not run
                trio.lowlevel.notify_closing(closing)
        self._told.close()
        os.close(self._descriptor)

    async def wait(self) -> int:
        """Until it has ended; as :meth:`poll`."""
        while self.poll() is None:
            # where the host has ended, nobody will report the end
            descriptor = self._descriptor if _readable(self._told.fileno()) else self._told.fileno()
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(descriptor)
        await trio.lowlevel.checkpoint()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """To it alone, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


class NodeHost:
    """A running host; :meth:`close` it. It imports in ``environment``, and writes to ``log`` if it fails."""

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hypha.cli.demo.node_host"],
                stdin=theirs.fileno(),
                stdout=file,
                stderr=file,
                env=self._environment,
                start_new_session=True,
            )

    async def fork(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: int,
        network_namespace: str | None = None,
    ) -> ForkedNode | None:
        """``python -m module arguments``, whose output goes to the descriptor ``output``. ``None``: it has to
        be started like any other program, as it is no component, its environment is not that in which the
        host has imported, or the host has failed.
        """
        if module not in COMPONENTS or self._differs(environment) or self._process.poll() is not None:
            return None
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": os.getcwd(),
            "network_namespace": network_namespace,
        }
        told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno(), output])
            await trio.lowlevel.wait_readable(told)
            reply, descriptors, _, _ = socket.recv_fds(told, _MAX_REPLY_BYTES, 1)
        except OSError:
            reply = b""
        if not reply:
            told.close()
            return None
        return ForkedNode(json.loads(reply)["pid"], descriptors[0], told)

    def _differs(self, environment: Mapping[str, str]) -> bool:
        return any(
            environment.get(name) != self._environment.get(name)
            for name in environment.keys() | self._environment.keys()
            if _READ_EARLY.match(name)
        )

    def close(self) -> None:
        """End it; nodes run on."""
        self._control.close()
        self._process.wait()

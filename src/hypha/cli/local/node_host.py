"""A node host: a process that has imported what Hypha's components need, and forks one on request.

Importing takes most of a node's start; a throw-away network (`hypha demo`, `hypha chaos`, the tests) starts
many. A host (``python -m hypha.cli.local.node_host``) takes requests from its standard input, a Unix socket,
and ends with it; nodes outlive it. It computes nothing and has one thread, so that a fork is as good as a
fresh process: it has the environment, directory, arguments, output and network namespace that were asked for,
a session of its own and its own command line in ``/proc``. :class:`NodeHost` is the side of those who ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
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
from typing import Any, NoReturn

import trio

from hypha.config.environment import replace_environment, set_variable
from hypha.processes.forking import close_all_but, run_main, start_afresh

#: what may be forked: each has a ``main``
COMPONENTS = ("hypha.cli.gateway", "hypha.cli.data", "hypha.cli.worker", "hypha.cli.scheduler")
#: what they import when they run
_LATER = (
    "hypha.cli.job.checking",
    "hypha.cli.job.scheduling",
    "hypha.config.reading.loading",
    "hypha.data",
    "hypha.gateway",
    "hypha.scheduler",
    "hypha.worker",
)
MAX_REQUEST_BYTES, _MAX_REPLY_BYTES = 1 << 17, 4096
#: variables that the interpreter, the C library or a package reads before a fork can change them
_READ_EARLY = re.compile("PYTHON|LD_|GLIBC_|MALLOC_|LANG|LC_|SSL_|OPENSSL|OMP_|OPENBLAS|NPY_|NUMPY")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class NodeForkServer:
    """Forks what ``control`` asks for."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poll = select.poll()
        #: by the pidfd of a node its PID, and where its end is told
        self._nodes: dict[int, tuple[int, socket.socket]] = {}

    def serve(self) -> None:
        """Until nobody can ask any more."""
        self._poll.register(self._control, select.POLLIN)
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor in self._nodes:
                    self._tell(descriptor)
                    continue
                data, descriptors, _, _ = socket.recv_fds(self._control, MAX_REQUEST_BYTES, 2)
                if not data:
                    return
                self._fork(json.loads(data), *descriptors)

    def _fork(self, request: dict[str, Any], reply: int, output: int) -> None:
        told = socket.socket(fileno=reply)
        # a signal must find the handlers of the node, not those of the host
        every = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = os.fork()
        if pid == 0:
            _become_node(request, output)
        signal.pthread_sigmask(signal.SIG_SETMASK, every)
        os.close(output)
        # opened here: only the parent knows that the number is still this process's
        descriptor = os.pidfd_open(pid)
        self._nodes[descriptor] = pid, told
        self._poll.register(descriptor, select.POLLIN)
        with contextlib.suppress(OSError):
            socket.send_fds(told, [json.dumps({"pid": pid}).encode()], [descriptor])

    def _tell(self, descriptor: int) -> None:
        pid, told = self._nodes.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        with told, contextlib.suppress(OSError):  # who asked is gone
            told.send(json.dumps({"status": status}).encode())


def _become_node(request: dict[str, Any], output: int) -> NoReturn:
    """In a fresh fork, whose signals are blocked."""

    def main() -> object:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        close_all_but()
        namespace = request["network_namespace"]
        if namespace is not None:
            with open(f"/run/netns/{namespace}") as place:
                enter_namespace(place.fileno())
        os.chdir(request["directory"])
        replace_environment(request["environment"])
        module, arguments = request["module"], request["arguments"]
        start_afresh([sys.executable, "-m", module, *arguments], module, arguments)
        sys.modules[module].main()
        return 0

    run_main(main)


def enter_namespace(descriptor: int) -> None:
    """The calling thread, in the network namespace of that file; raises OSError."""
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the network namespace cannot be entered: {os.strerror(number)}")


class ForkedNode:
    """Used as a :class:`trio.Process`. ``descriptor`` is its pidfd; how it ended is ``told``."""

    def __init__(self, pid: int, descriptor: int, told: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._told = told
        self._descriptor = descriptor

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it; ``None`` while it runs."""
        if self.returncode is None and _readable(self._descriptor):
            # the host reports it at once; where that has ended before, nobody knows how it ended
            reply = self._told.recv(_MAX_REPLY_BYTES)
            status = json.loads(reply)["status"] if reply else signal.SIGKILL
            self.returncode = os.waitstatus_to_exitcode(status)
            # another task may wait for it
            with contextlib.suppress(RuntimeError):  # trio does not run
                trio.lowlevel.notify_closing(self._descriptor)
            self._told.close()
            os.close(self._descriptor)
        return self.returncode

    async def wait(self) -> int:
        """Until it has ended; as :meth:`poll`."""
        while (code := self.poll()) is None:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._descriptor)
        await trio.lowlevel.checkpoint()
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """To it alone, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
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
                [sys.executable, "-m", "hypha.cli.local.node_host"],
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


def main() -> int:
    # Ctrl-C is for whoever asks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as control:
        # nodes compute nothing with numpy, whose library would start threads
        set_variable("OPENBLAS_NUM_THREADS", "1")
        for name in (*COMPONENTS, *_LATER):
            importlib.import_module(name)
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            print(
                f"an import has started {threads - 1} threads, which a fork would not have", file=sys.stderr
            )
            return 1
        # what is there stays, and is shared as long as nobody writes to it
        gc.collect()
        gc.freeze()
        NodeForkServer(control).serve()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

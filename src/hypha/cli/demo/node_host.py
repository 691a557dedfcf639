"""A node host: a process that has imported what Hypha's components need, and forks one on request.

Importing takes most of a node's start; a throw-away network (`hypha demo`, `hypha chaos`, the tests) starts
many. A host (``python -m hypha.cli.demo.node_host``) takes requests from its standard input, a Unix socket,
and ends with it; nodes outlive it. It computes nothing and has one thread, so that a fork is as good as a
fresh process: it has the environment, directory, arguments, output and network namespace that were asked for,
a session of its own and its own command line in ``/proc``. :mod:`hypha.cli.demo.forked` is the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from types import FrameType
from typing import Any, NoReturn

from hypha.config.environment import replace_environment, set_variable
from hypha.processes.forking import close_all_but, start_afresh

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
MAX_REQUEST_BYTES = 1 << 17
_CLONE_NEWNET = 0x40000000


class NodeForkServer:
    """Forks what ``control`` asks for."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        #: where the end of a node is told, by its PID
        self._told: dict[int, socket.socket] = {}
        woken, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noticed)
        self._woken = woken

    def serve(self) -> None:
        """Until nobody can ask any more."""
        while True:
            ready, _, _ = select.select([self._control.fileno(), self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._tell()
            if self._control.fileno() in ready:
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
        self._told[pid] = told
        # opened here: only the parent knows that the number is still this process's
        descriptor = os.pidfd_open(pid)
        with contextlib.suppress(OSError):
            socket.send_fds(told, [json.dumps({"pid": pid}).encode()], [descriptor])
        os.close(descriptor)

    def _tell(self) -> None:
        while self._told:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            told = self._told.pop(pid)
            with contextlib.suppress(OSError):  # who asked is gone
                told.send(json.dumps({"status": status}).encode())
            told.close()


def _noticed(number: int, frame: FrameType | None) -> None:
    """For SIGCHLD, which is ignored without a handler; :meth:`NodeForkServer.serve` is woken by its
    descriptor.
    """


def _become_node(request: dict[str, Any], output: int) -> NoReturn:
    """In a fresh fork, whose signals are blocked."""
    code = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        close_all_but()
        namespace = request["network_namespace"]
        if namespace is not None:
            _enter(namespace)
        os.chdir(request["directory"])
        replace_environment(request["environment"])
        module, arguments = request["module"], request["arguments"]
        start_afresh([sys.executable, "-m", module, *arguments], module, arguments)
        code = _run(module)
    except BaseException:  # noqa: BLE001 - nothing of the host's own code may run on here
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # its disk is full
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(module: str) -> int:
    try:
        sys.modules[module].main()
    except SystemExit as exc:
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0


def _enter(namespace: str) -> None:
    """The network namespace of that name; raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    if library.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"the network namespace {namespace} cannot be entered")
    os.close(descriptor)


def main() -> int:
    """The program; returns the exit code."""
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

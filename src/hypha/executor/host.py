"""An executor host: a process that has imported what Hypha's executors need, and forks one on request.

Importing torch, transformers and accelerate takes seconds, a fork milliseconds. A host asks nothing of the
network, trains nothing, opens no device and has one thread, so that its forks are as good as fresh processes:
it refuses to fork once that is not so. What is forked first is a keeper, the same as that of an executor that
its worker starts itself (:mod:`hypha.executor.forking`); the host itself owes executors nothing any more, and
they outlive it.

A worker's own host (``python -P -m hypha.executor.host``) takes requests from its standard input, a Unix
socket, and ends with it. With ``--socket PATH`` the workers of one machine and user share one; ``--lifeline``
makes it end when its standard input does. Requests are taken from the start. While modules are imported, one
is answered as soon as those it needs are there, and refused at once where its worker must start the executor
itself: :func:`unlike` says when.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib
import json
import os
import re
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec
import psutil

from hypha.config.environment import inherited_state, process_environment, set_variable
from hypha.messages import ForkRequest, NotForked, encode
from hypha.processes import keeper

#: What a fork may run: each has a ``main`` that takes the arguments and gives the exit code.
MODULES = ("hypha.executor.training", "hypha.executor.parameter_server", "hypha.executor.evaluate")
#: What jobs with a model of transformers import, the models' own modules excepted (some 50 ms each).
REST = ("accelerate", "transformers.modeling_utils", "transformers.loss.loss_utils")
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor")

MAX_REQUEST_BYTES = 1 << 18
#: The exit code of a host that can never fork: its worker does not start it again.
UNUSABLE = 3

#: Thread counts can be set in a fork, see :func:`hypha.executor.forking.become_executor`.
THREADS = frozenset(
    {
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS", "RAYON_NUM_THREADS",
    }
)  # fmt: skip
#: Read when a device is first used, which is after the fork.
_READ_LATE = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES"})
#: Variables that the interpreter, the C library or an imported package may have read already.
_READ_AT_IMPORT = re.compile(
    r"PYTHON|LD_|DYLD_|GLIBC_|MALLOC_|LANG|LC_|HOME$|XDG_CACHE_HOME$|SSL_"
    r"|OMP_|KMP_|GOMP_|MKL_|OPENBLAS|BLIS_|NUMEXPR_|VECLIB_|RAYON_|DNNL_|ONEDNN_|ATEN_|NPY_|NUMPY_"
    r"|TORCH|PYTORCH|TRITON|CUDA|CUDNN|CUBLAS|NCCL|NVIDIA_TF32|HIP_|HSA_|ROCM|MIOPEN|XPU|PJRT|XLA_"
    r"|HF_|HUGGINGFACE|TRANSFORMERS|ACCELERATE|TOKENIZERS|SAFETENSORS|BITSANDBYTES|USE_|DISABLE_"
)
_DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri", "/dev/accel")


def unlike(request: ForkRequest, environment: Mapping[str, str], state: Mapping[str, str]) -> str:
    """Why a fork of a host with that environment and inherited state would be another executor than one that
    the worker starts; empty when it would not.
    """
    if request.module not in MODULES:
        return f"{request.module} is none of its modules"
    if (request.python, request.package) != (sys.executable, keeper.__file__):
        return "the worker runs another Python, or another installation of Hypha"
    if differing := [name for name, value in request.inherited.items() if state.get(name) != value]:
        return f"the host was started with another {', '.join(sorted(differing))}"
    theirs = request.environment
    for name in sorted({*theirs, *environment}):
        if theirs.get(name) == environment.get(name) or name in _READ_LATE:
            continue
        if name in THREADS:
            if name in theirs and not re.fullmatch("[1-9][0-9]*", theirs[name]):
                return f"{name} is {theirs[name]!r}"
        elif _READ_AT_IMPORT.match(name):
            return f"{name}, which is read at import, differs from the host's"
    return ""


def unfit() -> str:
    """Why this process must not fork, in words; empty when it may."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"an import has started {threads - 1} threads, which would be missing in a fork"
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            device = os.readlink(f"/proc/self/fd/{name}")
            if device.startswith(_DEVICES):
                return f"an import has opened {device}, which a fork cannot use"
    return ""


@dataclass(frozen=True)
class _Asked:
    """A request, and its descriptors: where it is answered, the keeper's lifeline, where output goes."""

    request: ForkRequest
    reply: int
    lifeline: int
    output: int

    def close(self) -> None:
        for descriptor in (self.reply, self.lifeline, self.output):
            os.close(descriptor)

    def given_up(self) -> bool:
        """Nobody waits for the answer any more."""
        return _is_closed(self.reply, self.lifeline)


class ExecutorForkServer:
    """Takes requests from ``controls`` and whoever connects to ``listener``. Where ``lifeline``, a descriptor
    or one of the controls, ends, the process does.
    """

    def __init__(
        self, controls: Sequence[socket.socket], listener: socket.socket | None, lifeline: int | None
    ) -> None:
        self._environment = dict(process_environment())
        self._state = inherited_state()
        self._controls = list(controls)
        self._listener = listener
        self._waiting: list[_Asked] = []
        self._torch = self._all = False
        #: the keepers that were forked here, while they live; any other child was left by one that was killed
        self._keepers: set[int] = set()
        keeper.become_subreaper()
        # for the end of keepers, which nobody else collects
        self._wakeup, writable = os.pipe()
        for descriptor in (self._wakeup, writable):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _nothing)
        # its worker need not have waited until an import is over
        if listener is None:
            _end_with(self._controls[0].fileno())
        elif lifeline is not None:
            _end_with(lifeline)

    def run(self) -> NoReturn:
        """Import, then serve until the lifeline ends."""
        began = time.monotonic()
        # numpy's would start its threads when it is loaded; each fork sets its own number
        set_variable("OPENBLAS_NUM_THREADS", "1")
        for module in MODULES:
            importlib.import_module(module)
            self._serve(0.0)
        self._torch = True
        for module in REST:
            self._serve(0.0)
            with contextlib.suppress(ImportError):  # an executor that needs it says so better
                importlib.import_module(module)
        with contextlib.suppress(ImportError):
            transformers = importlib.import_module("transformers")
            for name in AUTO_CLASSES:
                self._serve(0.0)
                getattr(transformers, name, None)
        self._all = True
        if why := unfit():
            _say("ERROR", f"The executor host cannot be used: {why}.")
            sys.exit(UNUSABLE)
        gc.collect()
        # what is never looked at again is never copied
        gc.freeze()
        # its share of what it shares with others counted
        seconds, megabytes = time.monotonic() - began, psutil.Process().memory_full_info().pss / 1e6
        text = f"The executor host is ready: {megabytes:.0f} MB, imported in {seconds:.1f} s."
        _say("INFO", text, ready=True, memory_mb=round(megabytes), imported_s=round(seconds, 2))
        # those that were waiting, before anything new is waited for
        self._serve(0.0)
        while True:
            self._serve(None)

    def _serve(self, timeout_s: float | None) -> None:
        """Look once at everything, waiting at most that long for something to happen."""
        watched: list[socket.socket | int] = [*self._controls, self._wakeup]
        watched += [] if self._listener is None else [self._listener]
        ready, _, _ = select.select(watched, [], [], timeout_s)
        for one in ready:
            if one is self._listener:
                self._accept(self._listener)
            elif isinstance(one, socket.socket):
                self._receive(one)
            else:
                self._reap()
        for asked in list(self._waiting):
            if self._answer(asked):
                self._waiting.remove(asked)
                asked.close()

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] == os.getuid():
            self._controls.append(connection)
        else:
            connection.close()

    def _receive(self, control: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(control, MAX_REQUEST_BYTES, 3)
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._controls.remove(control)
            control.close()
            return
        try:
            request = msgspec.msgpack.decode(data, type=ForkRequest)
            reply, lifeline, output = descriptors
        except ValueError as exc:
            _say("WARNING", f"A request that cannot be read was dropped: {exc}")
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self._waiting.append(_Asked(request, reply, lifeline, output))

    def _answer(self, asked: _Asked) -> bool:
        """Fork or refuse; False when it has to wait for more imports."""
        if asked.given_up():
            return True
        why = unlike(asked.request, self._environment, self._state)
        if not why:
            if not (self._torch if asked.request.torch_only else self._all):
                return False
            why = unfit()
        if not why:
            try:
                self._fork(asked)
                return True
            except OSError as exc:
                why = f"it cannot fork: {exc}"
        with socket.socket(fileno=os.dup(asked.reply)) as reply, contextlib.suppress(OSError):
            reply.send(encode(NotForked(reason=why)))
        return True

    def _fork(self, asked: _Asked) -> None:
        # only now: it imports torch, and the first requests may be refused before that
        from hypha.executor.forking import become_keeper

        # until the handlers are the fork's own
        every = signal.valid_signals()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, every)
        pid = os.fork()
        if pid == 0:
            become_keeper(asked.request, asked.reply, asked.lifeline, asked.output)
        self._keepers.add(pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self._keepers.discard(pid)
        # nobody else would find them: their end is seen here again, until there are none
        for pid in keeper.children(os.getpid()):
            if pid not in self._keepers:
                for one in (pid, *keeper.descendants(pid)):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(one, signal.SIGKILL)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler: without one the wakeup descriptor is not written to."""


def _is_closed(*descriptors: int) -> bool:
    """Is the other end of one of them?"""
    poll = select.poll()
    for descriptor in descriptors:
        # of nothing else
        poll.register(descriptor, 0)
    return bool(poll.poll(0))


def _end_with(descriptor: int) -> None:
    """End this process as soon as the other end of ``descriptor`` is closed, whatever it does just then."""

    def look(number: int, frame: FrameType | None) -> None:
        if _is_closed(descriptor):
            os._exit(0)

    signal.signal(signal.SIGIO, look)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
    look(signal.SIGIO, None)


def _say(level: str, message: str, **fields: object) -> None:
    """One line of JSON, as components write their logs."""
    print(json.dumps({"level": level, "message": message, **fields}), flush=True)


def listen(path: Path) -> socket.socket:
    """A socket at ``path`` for this user alone. Its directory is made, and must be private."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.parent.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise SystemExit(f"{path.parent} must belong to this user, and be closed to all others (mode 0700)")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # it has its name once it can be used
    unnamed = path.with_name(f".{os.getpid()}")
    listener.bind(str(unnamed))
    unnamed.chmod(0o600)
    listener.listen(64)
    unnamed.rename(path)
    return listener


def main(arguments: Sequence[str]) -> NoReturn:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m hypha.executor.host", description=__doc__)
    parser.add_argument("--socket", type=Path, help="listen there, for workers that name it as warm_host")
    parser.add_argument("--lifeline", action="store_true", help="end when the standard input does")
    options = parser.parse_args(arguments)
    if not sys.flags.safe_path:
        # where it was started is no place to import from; a fork adds its own directory
        del sys.path[0]
    if options.socket is None:
        ExecutorForkServer([socket.socket(fileno=0)], None, None).run()
    ExecutorForkServer([], listen(options.socket), 0 if options.lifeline else None).run()


if __name__ == "__main__":
    main(sys.argv[1:])

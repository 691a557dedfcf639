"""What a fork of a process that has imported much has to give up, and to become like a fresh one.

Executor hosts (:mod:`hypha.executor.host`) and node hosts (:mod:`hypha.cli.local.node_host`) fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hypha.processes import keeper


def start_afresh(command: Sequence[str], module: str, arguments: Sequence[str]) -> None:
    """Give this fork what a fresh process ``command``, ``python -m module arguments``, has: default signal
    handlers, none of them blocked, no descriptors but 0, 1 and 2, the first of them the null device, its
    command line in ``/proc``, its path of modules, and a random state of its own.
    """
    signal.set_wakeup_fd(-1)
    for number in (*keeper.KEPT_SIGNALS, signal.SIGIO):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    close_all_but()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    set_command_line(command)
    time.tzset()
    tempfile.tempdir = None
    # as ``python -m`` has it
    sys.path.insert(0, os.getcwd())
    sys.argv = [str(sys.modules[module].__file__), *arguments]
    importlib.invalidate_caches()
    random.seed()


def run_main(main: Callable[[], object]) -> NoReturn:
    """End this fork as an interpreter would with that ``main``; nothing of the host's own code runs on."""
    code = 1
    try:
        result = main()
        code = result if isinstance(result, int) else 0
    except SystemExit as exc:
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:  # noqa: BLE001 - it is told, and ends here
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # its disk is full
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def close_all_but(*kept: int) -> None:
    """Close every descriptor above 2 that is not among ``kept``."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # that of the listing itself
                os.close(int(name))


def set_command_line(words: Sequence[str]) -> None:
    """Let ``/proc/self/cmdline`` say ``words``, for those who look for a process by its name.

    The kernel shows the memory in which the arguments were given to this process, and, where the last byte of
    that is no zero, goes on into the memory of the environment, which nobody uses any more (see
    :func:`~hypha.config.environment.replace_environment`); words are then separated by spaces.
    """
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    # proc(5) counts from 1, and the first two are before the bracket
    start, end, environment, limit = (int(fields[number - 3]) for number in (48, 49, 50, 51))
    text = b"\0".join(map(os.fsencode, words)) + b"\0"
    if not start:
        return
    capacity = end - start
    if len(text) > capacity and environment == end:
        capacity = limit - start
        text = text[: capacity - 1].replace(b"\0", b" ").rstrip() + b"\0"
    ctypes.memset(start, 0, capacity)
    ctypes.memmove(start, text[:capacity], min(len(text), capacity))

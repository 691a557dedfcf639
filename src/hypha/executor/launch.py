"""``python -m hypha.executor.launch FILE SOCKET``: the training executor as ``accelerate launch`` starts it.

FILE is accelerate's configuration (``accelerate config`` writes one): how many processes on this machine, and
whether the model is sharded (``FSDP``) or each has all of it. Where a process ends before the job has, the
others are ended; the last line of the output says which it was and why, and the exit code is that one's.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hypha.config.environment import set_variable, variable
from hypha.errors import ConfigError, HyphaError, Problem
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.inner.process_group import find_last_words
from hypha.executor.running import FLUSH_S, leave, set_up_log

logger = logging.getLogger("hypha.executor.launch")

MODULE = "hypha.executor.training"
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")


def launch_arguments(file: Path, socket: str) -> argparse.Namespace:
    """Those of ``accelerate launch``. Raises :class:`ConfigError`, which names the file and the key."""
    try:
        told: Any = load_config_from_file(str(file))
    except Exception as exc:
        # whatever a library raises of what an operator wrote
        raise _wrong(file, "", f"accelerate cannot read it: {exc}") from exc
    kind = str(getattr(told.distributed_type, "value", told.distributed_type)) if _is_local(told) else ""
    if kind not in _KINDS:
        raise _wrong(file, "distributed_type", f"it must be one of {', '.join(_KINDS)}")
    if told.num_machines not in (None, 1):
        raise _wrong(file, "num_machines", "an executor runs on one machine; set it to 1")
    if told.num_processes < 1:
        raise _wrong(file, "num_processes", "set it to the number of devices")
    seen = torch.cuda.device_count()
    if 0 < seen < told.num_processes:
        raise _wrong(
            file,
            "num_processes",
            f"it is {told.num_processes}, but the lease gives this executor {seen} GPU(s); let the "
            "job ask for the memory of as many (resources.worker.gpu)",
        )
    args: argparse.Namespace = launch_command_parser().parse_args(
        ["--config_file", str(file), "--module", MODULE, socket]
    )
    # processes on the CPU are otherwise a matter of MPI
    args.multi_gpu = kind in ("MULTI_CPU", "MULTI_GPU") and told.num_processes > 1
    if told.main_process_port is None:
        # several executors may run on this machine
        args.main_process_port = 0
    # what the lease has of processors is for all of them
    threads = variable("OMP_NUM_THREADS") or "1"
    args.num_cpu_threads_per_process = max(1, int(threads) // told.num_processes) if threads.isdigit() else 1
    return args


def _is_local(told: Any) -> bool:
    kind = getattr(told.compute_environment, "value", told.compute_environment)
    return str(kind) == "LOCAL_MACHINE"


def _wrong(file: Path, key: str, message: str) -> ConfigError:
    return ConfigError([Problem(key, message, source=str(file))])


def main(arguments: list[str]) -> int:
    """Entry point; the exit code."""
    set_up_log()
    file, socket = Path(arguments[0]), arguments[1]
    try:
        args = launch_arguments(file, socket)
    except HyphaError as exc:
        logger.error("%s", exc)
        return exc.exit_code
    if sys.platform == "linux":
        # they are all on this machine
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            set_variable(name, variable(name) or "lo")
    try:
        launch_command(args)
    except ChildFailedError as exc:
        rank, failure = exc.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if (words := find_last_words(Path.cwd())) is not None:
            bridge = BridgeClient(Path(socket).absolute(), Path.cwd())
            bridge.report(words.error)
            bridge.flush(FLUSH_S)
            # what else it said is in the output already
            said = words.error.message.partition("\n")[0]
            text = f"process {words.rank} of {args.num_processes}: {said}"
            code = words.exit_code
        elif failure.exitcode < 0:
            name = str(-failure.exitcode)
            with contextlib.suppress(ValueError):
                name = signal.Signals(-failure.exitcode).name
            text = f"process {rank} of {args.num_processes} was ended by {name}"
        else:
            text = f"process {rank} of {args.num_processes} ended with exit code {failure.exitcode}"
        logger.error("The executor ended: %s", text)
        return code
    except subprocess.CalledProcessError as exc:
        return exc.returncode if exc.returncode > 0 else 128 - exc.returncode
    except SignalException as exc:
        logger.info("The executor was ended by %s.", exc.sigval.name)
        return 128 + exc.sigval
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))

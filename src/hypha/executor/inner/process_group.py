"""The processes of an executor that trains on several devices: one each, joined by torch.distributed.

Rank 0 speaks to the worker; the others do what it broadcasts. Commands and rows go over gloo on this
machine, gradients and theta over NCCL between GPUs. All of them end together: where one cannot go on, the
launcher ends the others. What rank 0 cannot do it reports itself; another one leaves its last words in the
job directory, where the launcher (:mod:`hypha.executor.launch`) finds them and reports them.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from hypha.config.environment import process_environment
from hypha.decoding import decode_json
from hypha.errors import HyphaError, Undecodable
from hypha.executor.running import exit_code_of, last_words
from hypha.files.staging import write_whole
from hypha.messages import ExecutorError, encode_json

logger = logging.getLogger("hypha.executor.training")

#: A job may be paused for days, and the others wait for a command meanwhile. That one of them is gone shows
#: by its connections, and that one hangs the worker's watch sees.
_PATIENCE = datetime.timedelta(days=30)
#: Gradients are added up in pieces of so many bytes, so that one is on its way while the next is packed.
_PIECE_BYTES = 25 << 20
#: how long rank 0 waits for the launcher to end it, once another process is gone
_ENDED_WITHIN_S = 15.0
#: how gloo, NCCL and TCP say that another process is gone
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "NCCL communicator was aborted",
)


class ProcessLost(HyphaError):
    """Another process of this executor is gone, and has not said why."""


def is_lost(exc: BaseException) -> bool:
    """Does ``exc`` say no more than that another process of this executor is gone?"""
    return isinstance(exc, RuntimeError) and any(text in str(exc) for text in _GONE)


class LastWords(msgspec.Struct, frozen=True):
    """Why the process of ``rank`` cannot go on."""

    rank: int
    error: ExecutorError
    exit_code: int


def number_of_processes() -> int:
    """As the launcher has said; 1 without one."""
    text = process_environment().get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1


class ProcessGroup:
    """This process as one of ``size``, with ``rank`` from 0, and its device."""

    def __init__(self, directory: Path) -> None:
        """Joins the others, which join at the same time. ``directory`` is the job's."""
        self._directory = directory
        told = process_environment()
        cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if cuda:
            self.device = torch.device("cuda", int(told.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    # --- what rank 0 gives to the others ------------------------------------------------------------

    def command(self, *words: Any) -> tuple[Any, ...]:
        """``words`` of rank 0, in all processes: the name of a method that all call, and its arguments."""
        told = [words]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def send_rows(self, columns: Mapping[str, Tensor], to: int) -> None:
        """For :meth:`receive_rows` of rank ``to``."""
        data = save({name: value.contiguous() for name, value in columns.items()})
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.send(torch.tensor([len(buffer)]), to)
        dist.send(buffer, to)

    def receive_rows(self) -> dict[str, Tensor]:
        """From rank 0."""
        length = torch.empty(1, dtype=torch.int64)
        dist.recv(length, 0)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(buffer, 0)
        found: dict[str, Tensor] = load(buffer.numpy().tobytes())
        return found

    def broadcast(self, value: Tensor) -> None:
        """Overwrite the contiguous ``value``, on this process's device, with that of rank 0."""
        if value.numel():
            # of bytes there is no type that a backend lacks
            dist.broadcast(value.reshape(-1).view(torch.uint8), 0)

    # --- sums ---------------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes, in place."""
        dist.all_reduce(value)
        return value

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let each process have the sum of all their gradients. What had none anywhere keeps none: an
        optimizer leaves it alone.
        """
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
        dist.all_reduce(has, dist.ReduceOp.MAX)
        pieces: list[list[Tensor]] = [[]]
        size = 0
        for parameter, one in zip(parameters, has.tolist(), strict=True):
            if not one:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if size and size + parameter.grad.nbytes > _PIECE_BYTES:
                pieces.append([])
                size = 0
            pieces[-1].append(parameter.grad)
            size += parameter.grad.nbytes
        under_way = []
        for piece in pieces:
            if piece:
                flat = torch.cat([gradient.reshape(-1) for gradient in piece])
                under_way.append((piece, flat, dist.all_reduce(flat, async_op=True)))
        for piece, flat, work in under_way:
            if work is not None:
                work.wait()
            for gradient, part in zip(piece, torch.split(flat, [one.numel() for one in piece]), strict=True):
                gradient.copy_(part.view_as(gradient))

    # --- ends ---------------------------------------------------------------------------------------

    def leave_last_words(self, exc: Exception) -> int:
        """Write down why this process cannot go on, for the launcher; the exit code."""
        path, code = self._directory / f"last-words-{self.rank}.json", exit_code_of(exc)
        write_whole(path, encode_json(LastWords(self.rank, last_words(exc), code)))
        return code

    @contextmanager
    def whole(self) -> Iterator[None]:
        """For rank 0, that ends with :class:`ProcessLost` where another process is gone."""
        try:
            yield
        except RuntimeError as exc:
            if not is_lost(exc):
                raise
            # the launcher, which knows more, ends this one
            time.sleep(_ENDED_WITHIN_S)
            raise ProcessLost(
                f"one of the {self.size} processes of this executor was ended from outside, or crashed: "
                "what the executor wrote says which"
            ) from exc


def find_last_words(directory: Path) -> LastWords | None:
    """Of the process that failed first, if one has."""
    for path in sorted(directory.glob("last-words-*.json"), key=lambda path: path.stat().st_mtime_ns):
        try:
            return decode_json(path.read_bytes(), LastWords)
        except Undecodable as exc:
            logger.warning("%s cannot be read: %s", path.name, exc)
    return None

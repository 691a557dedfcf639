"""One outer synchronisation of 100 MB of fp32 parameters by two workers, against a gloo parameter server.

Both move 2 x 100 MB up and 2 x 100 MB down between three processes and take the Nesterov step. Ours is a
whole job: mutual TLS, files verified by their hashes, a scheduler that decides, the trainer's real code.
Its time is from the end of the last worker's last batch to the moment at which all workers begin their
first batch on the next theta. Blocks of the two are interleaved, medians compared.

Bytes on the wire are all that the loopback interface of a network namespace of our own carried, from before
the job's scheduler starts until it has ended: TCP, TLS, requests, gossip, the dataset. Against them stand
the bytes of tensors that have to move: updates, theta, the final checkpoint and the exported model.

Two means that only this number justifies are measured with and without: files that are written over, rather
than made anew and deleted, and XXH3 where BLAKE3 is not needed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import blake3
import numpy as np
import torch
import trio
import xxhash

from bench import gloo_server
from bench.jobs import Course, Rig, open_rig
from bench.report import Bound, Report, Row
from hypha.executor.files import tensors
from hypha.executor.files.reused import ReusedFiles

WORKERS = 2
MATRICES, SIDE = 25, 1000
PARAMETERS = MATRICES * SIDE * SIDE
PAYLOAD_BYTES = 4 * PARAMETERS
BLOCKS = 4
ROUNDS = 8
GLOO_REPEATS = 6
FILE_REPEATS = 9
#: Set in the copy of this program that runs inside the namespace.
_INSIDE = "HYPHA_BENCH_INSIDE"

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


@dataclass
class FileSeconds:
    """Seconds that a file of theta takes: written and given away, by means, and hashed."""

    reused: list[float] = field(default_factory=list)
    anew: list[float] = field(default_factory=list)
    xxh3: list[float] = field(default_factory=list)
    blake3: list[float] = field(default_factory=list)


def measure_files(directory: Path) -> FileSeconds:
    """One after the other, in turn."""
    measured = FileSeconds()
    theta = {f"{number}": torch.rand(SIDE, SIDE) for number in range(MATRICES)}
    content = memoryview(torch.rand(PARAMETERS).numpy()).cast("B")
    reused = ReusedFiles(directory / ".spare")

    def timed(into: list[float], work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        into.append(time.perf_counter() - began)

    def write(over: bool) -> None:
        path = directory / "theta"
        tensors.write(path, theta, reused=reused if over else None)
        reused.give(path) if over else path.unlink()

    write(over=True)
    for _ in range(FILE_REPEATS):
        timed(measured.reused, lambda: write(over=True))
        timed(measured.anew, lambda: write(over=False))
        timed(measured.xxh3, lambda: xxhash.xxh3_128(content).digest())
        timed(measured.blake3, lambda: blake3.blake3(content).digest())
    return measured


@dataclass
class Measured:
    """Seconds of single synchronisations; and by job, bytes carried over bytes that had to move."""

    ours: list[float] = field(default_factory=list)
    gloo: list[float] = field(default_factory=list)
    carried: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    files: FileSeconds = field(default_factory=FileSeconds)


def sync_seconds(course: Course) -> list[float]:
    """From the last worker's end of a round to the last worker's start of the next one; without the first
    synchronisation, in which memory and connections are new.
    """
    rounds = list(zip(*course.workers.values(), strict=True))
    taken = [
        max(one.began for one in later) - max(one.ended for one in earlier)
        for earlier, later in pairwise(rounds)
    ]
    return taken[1:]


def bytes_to_move(rounds: int) -> int:
    """Updates and theta of every round to and from each worker; at the end theta and momentum as a
    checkpoint and theta as the exported model.
    """
    return (2 * WORKERS * rounds + 3) * PAYLOAD_BYTES


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried so far, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise RuntimeError("there is no loopback interface")


async def one_job(rig: Rig, rounds: int) -> tuple[Course, float]:
    """A job, and the bytes carried over those that had to move."""
    before = loopback_bytes()
    model = {"entrypoint": "bench.models:stack", "arguments": {"count": MATRICES, "side": SIDE}}
    course = await rig.run(model, {"update_rounds": rounds, "inner_steps": 1}, WORKERS)
    return course, (loopback_bytes() - before) / bytes_to_move(rounds)


async def measure(directory: Path) -> Measured:
    """All blocks."""
    measured = Measured()
    data = np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32)
    measured.files = measure_files(directory)
    async with open_rig(directory, WORKERS, {"x": data}) as rig:
        for _ in range(BLOCKS):
            measured.loads.append(os.getloadavg()[0])
            course, carried = await one_job(rig, ROUNDS)
            measured.ours += sync_seconds(course)
            measured.carried.append(carried)
            measured.gloo += await trio.to_thread.run_sync(
                gloo_server.measure, PARAMETERS, WORKERS, GLOO_REPEATS
            )
    return measured


def report_on(measured: Measured, alone: bool) -> int:
    """Print and write; the exit code."""
    report = Report("outer_sync")
    count = len(measured.ours)
    loads = ", ".join(f"{load:.1f}" for load in measured.loads)
    report.add(
        Row(
            name=f"outer synchronisation, {PAYLOAD_BYTES / 1e6:.0f} MB x {WORKERS}",
            value=statistics.median(measured.ours),
            unit="s",
            reference=statistics.median(measured.gloo),
            bound=Bound("<=", 2.0),
            note=f"medians of {count} and {len(measured.gloo)}, against gloo; load at starts {loads}",
        )
    )
    report.add(
        Row(
            name="the same, shortest of each",
            value=min(measured.ours),
            unit="s",
            reference=min(measured.gloo),
            note="what the two take when nothing disturbs them",
        )
    )
    files = measured.files
    for name, with_it, otherwise, without in (
        (
            "a file of theta, written over an old one",
            files.reused,
            "a new one, deleted",
            files.anew,
        ),
        ("its hash, XXH3", files.xxh3, "BLAKE3", files.blake3),
    ):
        report.add(
            Row(
                name=name,
                value=statistics.median(with_it),
                unit="s",
                reference=statistics.median(without),
                bound=Bound("<=", 1.0),
                note=f"medians of {FILE_REPEATS}, against {otherwise}",
            )
        )
    if alone:
        report.add(
            Row(
                name="bytes on the wire over payload",
                value=max(measured.carried),
                unit="x",
                bound=Bound("<=", 1.02),
                note=f"worst of {BLOCKS} jobs; everything in our network namespace, headers included",
            )
        )
    else:
        print("bytes on the wire: not measured, no network namespace may be made here", file=sys.stderr)
    return report.finish()


# --- a network namespace of our own, whose counters nobody else moves -------------------------------------


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _namespace() -> list[str] | None:
    """A command that runs another one in a network namespace of its own; None where that is not allowed."""
    if shutil.which("unshare") is None:
        return None
    for command in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        if subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0:
            return command
    return None


def main() -> int:
    """Measure; returns the exit code."""
    namespace = _namespace()
    if _INSIDE not in os.environ and namespace is not None:
        command = [*namespace, sys.executable, "-m", "bench.outer_sync"]
        return subprocess.run(command, check=False, env={**os.environ, _INSIDE: "1"}).returncode
    alone = _INSIDE in os.environ
    if alone:
        _bring_loopback_up()
        # the machine's name leads nowhere in here
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
        measured = trio.run(measure, Path(name))
    return report_on(measured, alone)


if __name__ == "__main__":
    raise SystemExit(main())

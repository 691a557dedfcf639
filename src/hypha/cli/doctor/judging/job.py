"""What a job's size asks of its parameter server and of the lines to it."""

from __future__ import annotations

from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Finding
from hypha.cli.doctor.gathered import Contact
from hypha.config.job import JobConfig

GB = 10**9
#: theta, its momentum and one sum of updates, in fp32
BYTES_AT_SERVER = 3 * 4
#: of an update, by encoding
BYTES_OF_UPDATE = {"none": 4, "bf16": 2, "int8": 1}
BYTES_OF_THETA = 4


def judge_job(job: JobConfig, parameters: int | None, gateways: tuple[Contact, ...]) -> Iterator[Finding]:
    """``parameters`` are the numbers in the model's tensors, where known; ``gateways`` tell how fast the line
    is.
    """
    if not parameters:
        return
    needed = parameters * BYTES_AT_SERVER / GB
    offered = job.resources.parameter_server.memory
    if 0 < offered < needed:
        yield checks.PARAMETER_SERVER_SMALL.found(
            f"a model of {parameters} parameters takes {needed:.3g} GB at the parameter server, and "
            f"resources.parameter_server.memory is {offered:g}",
            f"set scheduler.job.resources.parameter_server.memory to at least {needed + 0.5:.1f}",
        )
    ups = [one.up for one in gateways if one.up]
    downs = [one.down for one in gateways if one.down]
    if not ups or not downs:
        return
    up_s = parameters * BYTES_OF_UPDATE.get(job.update_encoding, 4) / max(ups)
    down_s = parameters * BYTES_OF_THETA / max(downs)
    if up_s + down_s > job.rounds.deadline_s:
        yield checks.UPDATE_SLOW.found(
            f"over this line an update takes {up_s:.0f} s and theta {down_s:.0f} s, and a round is closed "
            f"{job.rounds.deadline_s:g} s after its projected end (rounds.deadline_s)"
        )

"""What a user sees of a job: in the terminal, under ``/status`` and in the demo."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from hypha.messages import UpdateStatistics
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.members import Member

JobState = Literal["allocating", "loading", "training", "paused", "exporting", "done", "failed"]


class WorkerSnapshot(Struct, frozen=True):
    """A training worker; ``batches`` of ``planned`` in the open round. ``update_norm`` is the L2 norm of its
    update in the last round and ``update_cosine`` that update's cosine to the mean of all, where known.
    """

    peer: str
    state: str
    batches: int = 0
    planned: int | None = None
    batch_size: int = 0
    samples_per_s: float = 0.0
    samples: int = 0
    loss: float | None = None
    lease: str = ""
    update_norm: float | None = None
    update_cosine: float | None = None


class JobSnapshot(Struct, frozen=True):
    """A job at a moment. ``message`` is the sentence a user needs; ``loss`` that of the last round."""

    name: str
    job_id: str = ""
    state: JobState = "allocating"
    phase: str = ""
    message: str = ""
    generation: int = 0
    round: int = 0
    rounds: int = 0
    samples: int = 0
    samples_per_s: float = 0.0
    loss: float | None = None
    theta: str = ""
    workers: tuple[WorkerSnapshot, ...] = ()
    parameter_server: str | None = None
    dataset: str = ""
    dataset_samples: int = 0
    providers: int = 0
    epoch: int = 0
    leases: int = 0
    checkpoint: int | None = None
    output: str = ""
    elapsed_s: float = 0.0
    refused: dict[str, int] = {}
    goodput: GoodputReport | None = None


def worker_snapshot(
    member: Member, round_: int, lease: str, update: UpdateStatistics | None = None
) -> WorkerSnapshot:
    """Of one member of the round machine."""
    return WorkerSnapshot(
        peer=member.peer,
        state=member.state(round_),
        batches=member.batches,
        planned=member.plan,
        batch_size=member.batch_size,
        samples_per_s=member.samples_per_s,
        samples=member.total_samples,
        loss=member.loss if math.isfinite(member.loss) else None,
        lease=lease,
        update_norm=update.norm if update is not None else None,
        update_cosine=update.cosine if update is not None else None,
    )

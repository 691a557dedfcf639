"""What a training executor has done of one round, as it reports it and as its update's header states it."""

from __future__ import annotations

from torch import Tensor

from hypha.executor.inner.losses import Losses
from hypha.executor.inner.slices_reader import RowStream
from hypha.messages import Contribution, Progress


class RoundCounts:
    """Batches of ``rows`` samples each, of ``round`` in its ``attempt``, which began at ``now`` (seconds of a
    monotonic clock) with ``steps`` inner steps taken before.
    """

    def __init__(self, round: int, attempt: int, rows: int, steps: int, now: float) -> None:
        self.round = round
        self.attempt = attempt
        self.rows = rows
        self.first_steps = steps
        self.batches = self.samples = 0
        self.busy_s = 0.0
        self.losses = Losses(now)

    def add(self, loss: Tensor, samples: int) -> None:
        """A batch is done."""
        self.losses.add(loss)
        self.batches += 1
        self.samples += samples

    def progress(self, loss: float, learning_rate: float = 0.0) -> Progress:
        """All of it, with the mean ``loss`` of the batches since the last report."""
        return Progress(
            round=self.round,
            batches=self.batches,
            samples=self.samples,
            busy_s=self.busy_s,
            loss=loss,
            learning_rate=learning_rate,
            attempt=self.attempt,
        )

    def contribution(
        self, worker: str, incarnation: str, restarts: int, stream: RowStream, threads: int = 1
    ) -> Contribution:
        """For what its update stands; ``stream`` is where the rows came from."""
        return Contribution(
            round=self.round,
            worker=worker,
            incarnation=incarnation,
            restarts=restarts,
            attempt=self.attempt,
            samples=self.samples,
            batches=self.batches,
            batch_size=self.rows,
            steps=self.first_steps,
            ranges=tuple(stream.ranges),
            finished=tuple(stream.finished),
            loss=self.losses.mean(),
            threads=threads,
        )

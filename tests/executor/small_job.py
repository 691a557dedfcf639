"""A whole job in one process, with the executors' own parts: two workers, two rounds, an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from hypha.executor.files import tensors, updates
from hypha.executor.files.theta import theta_of
from hypha.executor.inner.loop import Inner, Processor, round_seed
from hypha.executor.inner.slices_reader import RowStream, Slice, slice_order
from hypha.executor.models import loading as models
from hypha.executor.models.forward import Forward
from hypha.executor.models.model_tensors import ModelTensors, check_buffers, check_same_model
from hypha.executor.models.preprocessing import Preprocessor, padding_of
from hypha.executor.outer.step import OuterStep
from hypha.messages import (
    AggregateJob,
    ExecutorDescriptor,
    InnerOptimizer,
    ModelSpec,
    PeerRef,
    PreprocessorSpec,
    TrainJob,
)

ROUNDS, WORKERS, BATCHES = 2, ("first", "second"), 3


@dataclass
class Trained:
    """What is left of the job: theta's hashes, the exported files, and the server's model."""

    hashes: list[str]
    files: list[str]
    model: nn.Module
    notes: list[str]
    output: Path


class _Worker:
    def __init__(self, job: TrainJob, source: Path | None, scratch: Path) -> None:
        self.job = job
        model = models.build(job.model, source, weights=False)
        self.preprocess = None if job.preprocessor is None else Preprocessor(job.preprocessor, scratch)
        padding = padding_of(None, config=getattr(model, "config", None))
        self.stream = RowStream(self.preprocess.padding if self.preprocess else padding)
        self.tensors = ModelTensors(model)
        self.base = self.tensors.theta().copy()
        self.inner = Inner(model, Forward(model, job.model), job, Processor(), 0)

    def round(self, number: int, theta: Path, update: Path) -> int:
        check_same_model(theta, self.base)
        tensors.read(theta, self.base.all(), self.tensors.theta().all(), quick=True)
        torch.manual_seed(round_seed(self.job.seed, self.job.me, number))
        samples = 0
        for _ in range(BATCHES):
            columns = self.stream.take(self.job.batch_size)
            assert columns is not None, "the test gives too few rows"
            self.inner.batch(columns)
            samples += self.job.batch_size
        self.inner.flush()
        local = self.tensors.theta()
        check_buffers(local, self.base)
        updates.write_update(update, local, self.base)
        return samples


@tensors.one_thread()
def run(
    scratch: Path,
    spec: ModelSpec,
    source: Path | None,
    slices: list[dict[str, Tensor]],
    preprocessor: PreprocessorSpec | None = None,
    preprocessor_source: Path | None = None,
    batch_size: int = 4,
) -> Trained:
    """Train ``spec`` on ``slices``, all of which both workers get. Raises what the executors raise."""
    train = TrainJob(
        job_id="job",
        generation=0,
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        me="",
        scheduler=PeerRef(peer="scheduler"),
        parameter_server=PeerRef(peer="server"),
        model=spec,
        dataset="data",
        batch_size=batch_size,
        optimizer=InnerOptimizer(learning_rate=0.01),
        preprocessor=preprocessor,
        seed=3,
    )
    aggregate = AggregateJob(
        job_id="job",
        generation=0,
        executor=ExecutorDescriptor(kind="aggregate", name="parameter-server"),
        me="server",
        scheduler=PeerRef(peer="scheduler"),
        model=spec,
    )
    notes: list[str] = []
    model = models.build(spec, source, tell=notes.append).requires_grad_(False)
    theta = theta_of(model)
    outer = OuterStep(theta, aggregate)
    made = preprocessor_source or source or scratch
    workers = [_Worker(_for(train, me), source, made) for me in WORKERS]
    for worker in workers:
        for index, columns in enumerate(slices):
            rows = len(next(iter(columns.values())))
            given = columns if worker.preprocess is None else worker.preprocess(columns)
            worker.stream.push(Slice(0, index, given, slice_order(3, 0, index, rows)))
    file = scratch / "theta.safetensors"
    hashes = [tensors.write(file, theta.all()).blake3]
    for number in range(ROUNDS):
        for worker in workers:
            update = scratch / f"update-{worker.job.me}.safetensors"
            outer.add(worker.job.me, worker.round(number, file, update), update)
        outer.apply()
        hashes.append(tensors.write(file, theta.all()).blake3)
    output = scratch / "output"
    files = models.export(model, spec, source, output, preprocessor_source)
    return Trained(hashes, files, model, notes, output)


def _for(job: TrainJob, me: str) -> TrainJob:
    return msgspec.structs.replace(job, me=me)

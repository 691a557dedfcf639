"""Jobs from the first certificate to the exported model, over real processes and mutual TLS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from tests.support.system import UNNORMED, System, digits_dataset, digits_job

from hypha.config.job import outer_defaults
from hypha.data import PrepareOptions, prepare
from hypha.messages import OuterOptimizer

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]


async def test_four_workers_agree_with_a_replay_in_one_process(system: System, tmp_path: Path) -> None:
    """Unequal batch sizes and label-skewed slices: the sample-weighted mean is what must come out."""
    labels = load_digits().target
    skewed = digits_dataset(tmp_path, rows=np.argsort(labels, kind="stable").tolist())
    await system.gateway()
    await system.data("data", skewed)
    for number in range(4):
        # the batch size follows the memory offered over the memory asked for
        memory = 2.0 + 2.0 * number
        offer = {"strategy": "whole"}
        await system.worker(f"worker-{number}", offer=offer, resources={"cpu": 1, "memory": memory})
    await system.worker("server", executors=[{"class": "aggregate", "name": "parameter-server"}])
    job = digits_job(None, 4, 6)
    job["rounds"] = {"update_rounds": 6, "avg_samples_between_updates": 600, "max_batch_size": 8}
    job["resources"]["worker"] = {"cpu": 1, "memory": 1}
    scheduler = await system.scheduler(job)
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert "Advice on" not in scheduler.log.read_text()

    _, ledger = system.ledger("job")
    assert len(ledger.rounds) == 6
    # what was chosen is in the books, and so in the replay below
    assert ledger.aggregate.optimizer == OuterOptimizer(*outer_defaults(6))
    shares = [{part.worker: part.samples for part in entry.contributors} for entry in ledger.rounds]
    assert all(len(share) == 4 for share in shares)
    assert any(len(set(share.values())) > 1 for share in shares), "the samples should be unequal"
    assert await system.replay("job", skewed, None) <= 1e-5
    # the replay can tell: with the plain mean another model would have come out
    path, ledger = system.ledger("job")
    plain = msgspec.structs.replace(ledger.aggregate, weighting="uniform")
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(ledger, aggregate=plain)))
    assert await system.replay("job", skewed, None) > 1e-3


async def test_a_tiny_language_model_with_tied_embeddings(system: System, tmp_path: Path) -> None:
    """GPT-2 from a configuration, dropout and all, bytes as tokens, and updates of int8."""
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text() * 8)
    output = tmp_path / "dataset-text"
    prepare(
        PrepareOptions((text,), output, name="text", tokenizer="bytes", sequence_length=32, slice_samples=64)
    )
    directory = tmp_path / "gpt"
    directory.mkdir()
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 256}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **shape}
    (directory / "config.json").write_text(json.dumps(config))
    await system.gateway()
    await system.data("data", output)
    for number in range(2):
        await system.worker(f"worker-{number}")
    job: dict[str, Any] = digits_job(directory, 2, 5, update_encoding="int8")
    job |= {"model": {"type": "causal-lm", "path": str(directory)}, "dataset": {"dataset": "text"}}
    job["rounds"] = {"update_rounds": 5, "avg_samples_between_updates": 64, "batch_size": 8}
    job["outer_optimizer"] = {"learning_rate": 0.7, "momentum": 0.9}
    scheduler = await system.scheduler(job)
    # every worker says the hash of the theta it starts each round from; another one is an error
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert "another theta" not in scheduler.log.read_text()
    assert (
        scheduler.log.read_text().count("Advice on scheduler.job.outer_optimizer.momentum: 0.9 is much") == 1
    )

    _, ledger = system.ledger("job")
    assert len({entry.theta for entry in ledger.rounds}) == 5
    assert ledger.aggregate.optimizer == OuterOptimizer(learning_rate=0.7, momentum=0.9)
    assert ledger.rounds[-1].contributors[0].loss < ledger.rounds[0].contributors[0].loss
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert "transformer.wte.weight" in exported
    assert await system.replay("job", output, directory) <= 1e-5


async def test_nodes_start_in_any_order_two_data_nodes_serve_and_two_processes_train(
    system: System, tmp_path: Path
) -> None:
    dataset = digits_dataset(tmp_path)
    planned = system.plan_gateway()
    scheduler = await system.scheduler(digits_job(None, 1, 3) | {"model": UNNORMED})
    two = tmp_path / "two.yaml"
    two.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\n"
        "num_processes: 2\nuse_cpu: true\n"
    )
    spread = {"class": "train", "name": "diloco-transformer", "accelerate": str(two)}
    aggregate = {"class": "aggregate", "name": "parameter-server"}
    worker = await system.worker(
        "worker", executors=[spread, aggregate], log_level="info,hypha.worker.executor=debug"
    )
    for child in (scheduler, worker):
        await system.logged(child, "gateway")
    await system.data("data-1", dataset)
    await system.data("data-2", dataset)
    await system.gateway(planned=planned)
    found = await system.reached(scheduler, lambda snapshot: snapshot.providers == 2)
    assert found.state not in ("failed",)
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert "trained by 2 processes" in worker.log.read_text()
    assert await system.replay("job", dataset, None) <= 1e-5

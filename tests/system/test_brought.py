"""What people bring, through whole networks of real processes: texts of different lengths, a model whose
weights are not what its configuration says, labels that it has no classes for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from safetensors.numpy import load_file, save_file
from tests.executor.test_preprocessing import tokenizer
from tests.support.system import PLAIN, System, digits_dataset, digits_job, digits_model, paced

from hypha.data import PrepareOptions, prepare
from hypha.executor.models import loading as models
from hypha.messages import ModelSpec

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

GENERATION = {"temperature": 0.25, "do_sample": True, "eos_token_id": 0}


def sentences(root: Path) -> Path:
    """Slices of 20 sentences; in each slice the longest has another length."""
    raw = np.zeros((200, 64), dtype=np.uint8)
    for row in range(len(raw)):
        words = ("good day night " * 9).split()[: 1 + row % 3 + row // 20]
        text = " ".join(words).encode()
        raw[row, : len(text)] = np.frombuffer(text, dtype=np.uint8)
    (root / "raw-texts").mkdir()
    np.save(root / "raw-texts" / "sentence.npy", raw)
    output = root / "texts"
    prepare(PrepareOptions((root / "raw-texts",), output, name="texts", slice_samples=20, shuffle=False))
    return output


def language_model(root: Path) -> Path:
    """Tied by its configuration, two matrices by its weights, and with a file that only generation needs."""
    config: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 16, "n_embd": 8}
    config |= {"n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    fresh = root / "fresh"
    fresh.mkdir()
    (fresh / "config.json").write_text(json.dumps(config))
    spec = ModelSpec(task="causal-lm", seed=5)
    source = root / "source"
    models.export(models.build(spec, fresh), spec, None, source)
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"][::-1].copy()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text(json.dumps(GENERATION))
    (source / "notes").mkdir()
    (source / "notes" / "origin.txt").write_text("made for a test")
    return source


async def test_ragged_texts_and_a_model_that_is_not_tied_after_all(system: System, tmp_path: Path) -> None:
    dataset, source = sentences(tmp_path), language_model(tmp_path)
    made = tokenizer(tmp_path / "tokenizer")
    await system.gateway()
    await system.data("data", dataset)
    executors = [paced(0.05), {"class": "aggregate", "name": "parameter-server"}]
    # one of them shows its executors neither the network nor its own files
    isolated = [{**one, "runtime": "bwrap"} for one in executors]
    for number, those in enumerate((executors, isolated)):
        await system.worker(f"worker-{number}", executors=those)
    preprocessor = {"type": "tokenizer", "path": str(made), "input_names": {"text": "sentence"}}
    job = digits_job(None, 2, 6, preprocessor=preprocessor, checkpoint={"every_rounds": 1})
    job |= {"model": {"type": "causal-lm", "path": str(source)}, "dataset": {"dataset": "texts"}}
    job["rounds"] |= {"batch_size": 6, "avg_samples_between_updates": 90}
    scheduler = await system.scheduler(job)
    await system.reached(scheduler, lambda seen: seen.checkpoint is not None and seen.checkpoint >= 2)
    assert "both are trained" in scheduler.log.read_text(), "the user is told of what was decided"
    await system.stop_job(scheduler)
    again = await system.start("scheduler+1", "scheduler", tmp_path / "scheduler.toml")
    assert await system.ended(again) == 0, again.tail()

    out = tmp_path / "model"
    assert json.loads((out / "generation_config.json").read_text()) == GENERATION
    assert (out / "notes" / "origin.txt").read_text() == "made for a test"
    assert (out / "tokenizer.json").exists()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    weights = load_file(out / "model.safetensors")
    assert not np.array_equal(weights["lm_head.weight"], weights["transformer.wte.weight"])
    _, ledger = system.ledger("job")
    assert {part.batch_size for entry in ledger.rounds for part in entry.contributors} == {6}
    preprocessed = tmp_path / "everything"
    preprocessed.mkdir()
    for path in (*source.iterdir(), *made.iterdir()):
        if path.is_file():
            (preprocessed / path.name).write_bytes(path.read_bytes())
    assert await system.replay("job", dataset, preprocessed) <= 1e-5


async def validated(system: System, job: dict[str, Any], *more: str) -> tuple[int, str]:
    """``validate --network`` of a job under another name than that of any that has run: exit code, output."""
    path = system.write("asker", "scheduler", scheduler={"job": {"output": str(system.root / "no"), **job}})
    command = (sys.executable, "-m", "hypha.cli.scheduler", "validate", "--network", "--config", str(path))
    done = await trio.run_process(
        [*command, *more],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=dict(system.group.environment),
    )
    return done.returncode, (done.stdout + done.stderr).decode()


async def test_labels_without_classes_are_told_before_anybody_is_leased_or_at_once(
    system: System, tmp_path: Path
) -> None:
    """Then goes on nevertheless, as when the check is wrong: two executors say the same."""
    dataset = digits_dataset(tmp_path)
    labels = {str(number): str(number) for number in range(4)}
    await system.gateway()
    await system.data("data", dataset)
    workers = [await system.worker(f"worker-{number}") for number in range(2)]
    for worker in workers:
        await system.logged(worker, "Connected to gateway")
    job = digits_job(digits_model(tmp_path, id2label=labels), 2, 6)

    asked = {**job, "name": "asked"}
    code, text = await validated(system, asked | {"model": PLAIN})
    assert code == 0, text
    assert "/p2p/" in text
    assert ": reached" in text
    assert "1797 samples in 30 slices, served by" in text
    assert "column: labels I64, 0 to 9" in text
    assert "; a batch passed" in text
    code, text = await validated(system, asked)
    assert code == 2, text
    assert "labels runs from 0 to 9, but the model has 4 classes, 0 to 3; set num_labels to" in text
    code, text = await validated(system, asked | {"dataset": {"dataset": "letters", "wait_s": 1.0}})
    assert code == 3, text
    assert "nobody served the dataset letters" in text
    nowhere = json.dumps(["/ip4/127.0.0.1/tcp/1", *system.gateways])
    code, text = await validated(system, asked, "--set", f"gateway_addresses={nowhere}")
    assert "gateway /ip4/127.0.0.1/tcp/1: NOT reached" in text
    assert f"gateway {system.gateways[0]}: reached" in text

    refused = await system.scheduler({**job, "name": "refused", "check": "full"}, name="scheduler-refused")
    assert await system.ended(refused) == 2, refused.tail()
    assert "Before anybody is leased: scheduler.job.model.arguments: the column labels" in refused.tail()
    assert "Looking for 2 more workers" not in refused.log.read_text()

    scheduler = await system.scheduler({**job, "check": "none"})
    assert await system.ended(scheduler) == 5, scheduler.tail()
    text = scheduler.log.read_text()
    assert "Looking for 2 more workers" in text
    error = next(line for line in text.splitlines() if "said by 2 executors" in line)
    assert "the model has 4 classes, 0 to 3; set model.arguments num_labels to the number of classes" in error
    assert "IndexError" not in error, "what to change comes before the traceback"
    starts = sum(worker.log.read_text().count("The executor cannot go on.") for worker in workers)
    assert starts <= 3

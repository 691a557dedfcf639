"""The whole check of a job, but for the child process that tries a batch."""

from __future__ import annotations

import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.scheduler.preflight.test_findings import DIGITS, RESNET, TOKENS, manifest
from tests.support.hub import Hub, Repository
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha.config.job import DatasetRef, JobConfig
from hypha.errors import ConfigError
from hypha.messages import Column, DatasetDescription, Manifest, Trial, TrialReport
from hypha.node import Node
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.durable.database import SCHEMA, left_behind
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.replicas import Replicas
from hypha.scheduler.durable.starts import first_generation
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.preflight.checking import Checked, RunTrial, check_before_leasing, check_job

PASSED = TrialReport(outcome="passed")
LLAMA = {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 8}


def replies(report: TrialReport, asked: list[Trial]) -> RunTrial:
    """What was ``asked`` is noted."""

    async def run(trial: Trial) -> TrialReport:
        asked.append(trial)
        return report

    return run


def job(path: Path, config: dict[str, object], task: str = "image-classification", **keys: Any) -> JobConfig:
    directory = path / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return JobConfig.model_validate(
        {
            "model": {"type": task, "path": directory},
            "dataset": {"dataset": "d"},
            "rounds": {"avg_samples_between_updates": 10},
            "resources": {"num_workers": 2},
            "output": "out",
            **keys,
        }
    )


def shown(checked: Checked) -> list[tuple[bool, str]]:
    return [(one.error, one.message) for one in checked.findings]


async def test_what_is_wrong_by_itself_needs_no_trial(tmp_path: Path) -> None:
    asked: list[Trial] = []
    trial = replies(PASSED, asked)
    wrong = manifest(*DIGITS, labels=(0, 11))
    checked = await check_job(job(tmp_path, RESNET), wrong, trial)
    assert len(checked.errors) == 1
    assert asked == []
    assert (await check_job(job(tmp_path, RESNET), wrong, None)).errors == checked.errors


async def test_a_trial_decides_what_a_comparison_leaves_open(tmp_path: Path) -> None:
    data = manifest(*TOKENS, input_ids=(0, 63))
    config = job(tmp_path, LLAMA, "causal-lm", rounds={"inner_steps": 5, "batch_size": 1})
    tried: list[Trial] = []
    passed = replies(TrialReport(outcome="passed", notes=("it begins fresh",)), tried)
    assert shown(await check_job(config, data, passed)) == [(False, "it begins fresh")]
    (asked,) = tried
    assert (asked.model, asked.weights, asked.rows) == (str(tmp_path / "model"), True, 1)
    assert (asked.columns, asked.ranges) == (data.columns, data.ranges)

    failed = replies(TrialReport(outcome="failed", reason="the rows have 16 tokens"), [])
    first, second = shown(await check_job(config, data, failed))
    assert first == (True, "the rows have 16 tokens")
    assert not second[0]

    unknown = replies(TrialReport(outcome="unknown", reason="torch is not installed"), [])
    told = shown(await check_job(config, data, unknown))
    assert [error for error, _ in told] == [False, False]
    assert any("no batch could be tried here: torch is not installed" in text for _, text in told)


async def test_of_a_repository_the_configuration_is_compared_and_no_secret_goes_to_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Trial] = []
    trial = replies(PASSED, asked)
    files = {"config.json": json.dumps(RESNET).encode()}
    hub = Hub({"us/model": Repository([files], writer="hub-token", private=True)})
    model = {"type": "image-classification", "repository": "us/model"}
    with hub.serve() as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        refused = await check_job(job(tmp_path, {}, model=model), manifest(*DIGITS), trial)
        assert [one.key for one in refused.errors] == ["scheduler.job.model.repository"]
        config = job(tmp_path, {}, model={**model, "token": "hub-token"})
        wrong = await check_job(config, manifest(*DIGITS, labels=(0, 11)), trial)
        assert "10 classes" in wrong.errors[0].message
        assert asked == []
        assert await check_job(config, manifest(*DIGITS, labels=(0, 9)), trial) == Checked((), trial=PASSED)
    (one,) = asked
    assert not one.weights
    assert "hub-token" not in repr(one)
    assert one.model is not None
    assert not Path(one.model).exists(), "what was fetched is gone"


async def test_what_peers_call_their_columns_controls_no_terminal(tmp_path: Path) -> None:
    column = Column(name="\x1b[2J\nfine", dtype="I64", shape=())
    data = msgspec.structs.replace(manifest(*DIGITS), columns=(column,))
    checked = await check_job(job(tmp_path, RESNET), data, None)
    assert len(checked.errors) == 2
    assert all(one.message.isprintable() for one in checked.findings)


async def test_what_another_executor_makes_of_it_is_not_judged(tmp_path: Path) -> None:
    asked: list[Trial] = []
    trial = replies(TrialReport(outcome="failed", reason="no"), asked)
    resources = {"num_workers": 2, "worker_executor": "ours"}
    config = job(tmp_path, RESNET, resources=resources)
    assert await check_job(config, manifest(*DIGITS, labels=(0, 11)), trial) == Checked(())
    assert asked == []


async def test_files_that_may_not_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path, RESNET)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"")
    # whoever runs tests as root may read everything
    monkeypatch.setattr("os.access", lambda path, mode: path != weights)
    checked = await check_job(config, manifest(*DIGITS, labels=(0, 9)), None)
    assert [one.key for one in checked.errors] == ["scheduler.job.model.path"]
    assert str(weights) in checked.errors[0].message


async def test_errors_end_the_job_with_all_of_them_and_advice_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data: Manifest = manifest("labels I64", "pixel_values F32 3 8 8", slices=1, labels=(0, 11))
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError) as caught:
        await check_before_leasing(job(tmp_path, RESNET), data, None)
    assert caught.value.exit_code == 2
    keys = [problem.key.removeprefix("scheduler.job.") for problem in caught.value.problems]
    assert keys == ["model.arguments", "dataset.dataset", "check"]
    assert "--no-check" in str(caught.value.problems[-1])
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "WARNING"]
    caplog.clear()
    await check_before_leasing(job(tmp_path, RESNET), manifest(*DIGITS, labels=(0, 9)), None)
    assert not caplog.records


async def test_a_job_that_has_trained_is_known_by_its_ledger(tmp_path: Path) -> None:
    path = tmp_path / "job.db"
    assert not (await left_behind(path)).trained
    with sqlite3.connect(path) as db:
        assert not (await left_behind(path)).trained
        db.executescript(SCHEMA)
        assert not (await left_behind(path)).trained
        db.execute("INSERT INTO rounds VALUES (1, 0, 0, 0, 8, 'theta', '{}')")
    db.close()
    assert (await left_behind(path)).trained


@virtual_time
async def test_the_name_of_a_job_that_is_done_begins_anew_with_another_description(
    network: VirtualNetwork, tmp_path: Path
) -> None:
    """Which is checked like any job: 4 classes for 10 labels were noticed by workers only."""
    digits = DatasetDescription(manifest=manifest(*DIGITS, labels=(0, 9)), manifest_hash="h")
    dataset = ServedDataset(DatasetRef(dataset="d"), digits, [])
    before = job(tmp_path, RESNET)
    after = job(tmp_path, RESNET, outer_optimizer={"momentum": 0.5})
    checked: list[str] = []

    async def begin(config: JobConfig, scheduler: Node, state: StateDirectory) -> str:
        async def check() -> None:
            checked.append(config.name)

        replicas = Replicas(scheduler, config.name)
        first = first_generation(state, config, scheduler.ref(), dataset, replicas, check)
        ledger, generation = await first
        ledger.close()
        return generation.start.job_id

    with StateDirectory(tmp_path, "job") as state:
        async with (
            network.gateway() as gateway,
            network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        ):
            first = await begin(before, scheduler, state)
            with closing(Ledger(state.ledger)) as ledger:
                ledger.done("out", "out")
            assert await begin(before, scheduler, state) == first
            with closing(Ledger(state.ledger)) as ledger:
                ledger.done("out", "out")
            assert not checked
            assert await begin(after, scheduler, state) != first
            assert len(checked) == 1

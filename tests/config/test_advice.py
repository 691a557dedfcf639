"""Advice: about settings that are far off, never about defaults, and never instead of an error."""

from __future__ import annotations

from typing import Any

import pytest

from hypha.config.advice import advice, steps_of_a_worker
from hypha.config.models import GatewayConfig, SchedulerConfig

NODE = {"cert_pem": "c", "key_pem": "k", "trust_pem": "t"}


def scheduler(**job: Any) -> SchedulerConfig:
    rounds = {"update_rounds": 8, "inner_steps": 50} | job.pop("rounds", {})
    return SchedulerConfig.model_validate(
        {
            **NODE,
            "gateway_addresses": ["/ip4/192.0.2.1/tcp/8080"],
            "scheduler": {
                "job": {
                    "model": {"type": "torch", "entrypoint": "a.b:c"},
                    "dataset": {"dataset": "digits"},
                    "output": "out",
                    "rounds": rounds,
                    **job,
                }
            },
        }
    )


def told(**job: Any) -> list[str]:
    return [one.key.removeprefix("scheduler.job.") for one in advice(scheduler(**job))]


@pytest.mark.parametrize("rounds", [1, 2, 8, 20, 50, 200, 5000])
def test_defaults_need_no_advice(rounds: int) -> None:
    assert told(rounds={"update_rounds": rounds}) == []
    assert told(rounds={"inner_steps": None, "avg_samples_between_updates": 1200}) == []


def test_other_components_get_none() -> None:
    assert advice(GatewayConfig.model_validate(NODE | {"external_addresses": ["/ip4/192.0.2.1/tcp/1"]})) == []


@pytest.mark.parametrize(
    ("rounds", "outer", "key"),
    [
        (8, {"learning_rate": 0.7, "momentum": 0.9}, "outer_optimizer.momentum"),
        (8, {"momentum": 0.9}, "outer_optimizer.momentum"),
        (8, {"learning_rate": 0.7, "momentum": 0.5}, None),
        (8, {"learning_rate": 1.0, "momentum": 0.0}, None),
        (200, {"learning_rate": 0.7, "momentum": 0.9}, "outer_optimizer.momentum"),
        (5000, {"learning_rate": 0.7, "momentum": 0.9}, None),
        (200, {"learning_rate": 0.5, "momentum": 0.0}, "outer_optimizer"),
        (200, {"learning_rate": 0.1}, "outer_optimizer"),
        (20, {"learning_rate": 5.0}, "outer_optimizer"),
    ],
)
def test_an_outer_optimizer_that_is_far_off(rounds: int, outer: dict[str, float], key: str | None) -> None:
    found = advice(scheduler(rounds={"update_rounds": rounds}, outer_optimizer=outer))
    assert [one.key for one in found] == ([f"scheduler.job.{key}"] if key else [])
    assert all("leave both out for learning_rate" in one.message for one in found)


@pytest.mark.parametrize(
    ("job", "keys"),
    [
        ({"rounds": {"batch_size": 1}}, ["rounds.batch_size"]),
        ({"rounds": {"max_batch_size": 1}}, ["rounds.max_batch_size"]),
        ({"rounds": {"batch_size": 2}}, []),
        ({"rounds": {"inner_steps": 1}}, ["rounds.inner_steps"]),
        (
            {"rounds": {"inner_steps": None, "avg_samples_between_updates": 32, "batch_size": 16}},
            ["rounds.avg_samples_between_updates"],
        ),
        ({"inner_optimizer": {"learning_rate": 0.1}}, ["inner_optimizer.learning_rate"]),
        ({"schedule": {"type": "constant", "warmup_steps": 5}}, ["schedule.warmup_steps"]),
        ({"schedule": {"type": "linear-with-warmup", "training_steps": 400, "warmup_steps": 40}}, []),
        (
            {"schedule": {"type": "linear-with-warmup", "training_steps": 400, "warmup_steps": 400}},
            ["schedule.warmup_steps"],
        ),
        (
            {"schedule": {"type": "cosine-with-warmup", "training_steps": 900, "warmup_steps": 500}},
            ["schedule.warmup_steps"],
        ),
        (
            {"schedule": {"type": "cosine-with-warmup", "training_steps": 100}},
            ["schedule.training_steps"],
        ),
        (
            {"schedule": {"type": "wsd", "training_steps": 400, "warmup_steps": 100, "decay_steps": 350}},
            ["schedule.decay_steps"],
        ),
        ({"rounds": {"quorum": 0.5}, "resources": {"num_workers": 2}}, ["rounds.quorum"]),
        ({"rounds": {"quorum": 0.5}, "resources": {"num_workers": 1}}, ["rounds.quorum"]),
        ({"rounds": {"quorum": 0.75}, "resources": {"num_workers": 4}}, []),
    ],
)
def test_what_is_hardly_ever_meant(job: dict[str, Any], keys: list[str]) -> None:
    assert told(**job) == keys


def test_how_many_steps_a_worker_takes() -> None:
    def steps(**rounds: Any) -> int:
        return steps_of_a_worker(scheduler(rounds=rounds, resources={"num_workers": 4}).scheduler.job)

    samples = {"inner_steps": None, "avg_samples_between_updates": 1600}
    assert steps(inner_steps=30) == 240
    assert steps(inner_steps=30, gradient_accumulation=4) == 240
    assert steps(**samples, batch_size=10) == 8 * 40
    assert steps(**samples, batch_size=10, gradient_accumulation=4) == 8 * 10
    assert steps(**samples) == 8 * 25

"""Whole networks of real processes that are killed, stopped and cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.system import SMALL, System, digits_dataset, digits_job, leftovers, open_system, paced

SHORT_LEASE: dict[str, Any] = {"offer": {"lease_s": 6.0}}
SERVER_ONLY: dict[str, Any] = {"executors": [{"class": "aggregate", "name": "parameter-server"}]}
#: a round of 60 batches takes a second, and leaves the cores to others
TRAINING_ONLY: dict[str, Any] = {"executors": [paced(0.015)]}


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    """An empty network in ``tmp_path``; nothing of it may run on after the test."""
    async with open_system(tmp_path) as opened:
        yield opened
    assert leftovers(tmp_path) == []


class Job:
    """A small job whose rounds are long enough for a fault to be placed in them."""

    def __init__(self, root: Path) -> None:
        self.dataset = digits_dataset(root)

    def __call__(
        self, workers: int, rounds: int, samples: int = 1920, name: str = "job", **resources: Any
    ) -> dict[str, Any]:
        job = digits_job(None, workers, rounds, checkpoint={"every_rounds": 1}, name=name) | {"model": SMALL}
        job["rounds"]["avg_samples_between_updates"] = samples
        job["resources"] |= resources
        return job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Makes the job; its dataset is prepared."""
    return Job(tmp_path)

"""Would this worker's offer be taken by that job's request, and if not, which term fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cli.doctor.staging import job_config, only, worker_config
from tests.support.network import Pki

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding
from hypha.cli.doctor.judging.job import capacity_of, judge_offers, try_offers
from hypha.config.job import JobConfig
from hypha.config.models import WorkerConfig
from hypha.features import OURS, Abilities
from hypha.worker.limits.detecting import DetectedMachine
from hypha.worker.limits.gpus import Gpu


@pytest.fixture
def worker(tmp_path: Path) -> WorkerConfig:
    return worker_config(Pki(tmp_path / "pki"), tmp_path)


def judged(
    worker: WorkerConfig, job: JobConfig, machine: DetectedMachine | None = None, abilities: Abilities = OURS
) -> list[Finding]:
    capacity = replace(capacity_of(worker, machine), abilities=abilities)
    return list(judge_offers(capacity, worker.offer, job))


def tried(worker: WorkerConfig, job: JobConfig, machine: DetectedMachine | None = None) -> list[str | None]:
    """The terms that fail, or None, by class of executor."""
    return [one.term for one in try_offers(capacity_of(worker, machine), worker.offer, job)]


def changed(worker: WorkerConfig, **sections: dict[str, Any]) -> WorkerConfig:
    return worker.model_copy(
        update={name: getattr(worker, name).model_copy(update=changes) for name, changes in sections.items()}
    )


def test_a_worker_that_suits_the_job(worker: WorkerConfig) -> None:
    assert tried(worker, job_config()) == [None, None]
    assert judged(worker, job_config()) == []


def test_a_job_that_asks_for_more_than_the_worker_has(worker: WorkerConfig) -> None:
    job = job_config(resources={"worker": {"memory": 64, "gpu": 8}, "parameter_server": {"memory": 0.1}})
    one = only(judged(worker, job), checks.OFFER_RESOURCES)
    assert "memory: 64 is asked for, 0.1 offered; gpu: 8 is asked for, 0 offered" in one.what
    assert one.mend == (
        "raise memory and gpu in the worker's [resources], or lower it in scheduler.job.resources.worker"
    )
    # it could still be the parameter server
    assert one.severity == "warning"


def test_a_bid_below_the_workers_floor(worker: WorkerConfig) -> None:
    # it raises its bid to its maximum while nobody comes, and that is not enough either
    prices = {"worker_price": {"bid": 2, "max": 2.5}, "parameter_server_price": {"bid": 9, "max": 9}}
    resources = {"worker": {"memory": 0.1}, "parameter_server": {"memory": 0.1}, **prices}
    cheap = changed(worker, offer={"floor": 3.0, "price": 3.0})
    one = only(judged(cheap, job_config(resources=resources)), checks.OFFER_PRICE)
    assert "below this worker's floor of 3 and the job bids 2" in one.what
    assert one.mend == "lower offer.floor to 2, or raise scheduler.job.resources.worker_price.bid to 3"


def test_a_price_above_what_the_job_pays(worker: WorkerConfig) -> None:
    prices = {"worker_price": {"bid": 2, "max": 4}, "parameter_server_price": {"bid": 2, "max": 9}}
    resources = {"worker": {"memory": 0.1}, "parameter_server": {"memory": 0.1}, **prices}
    dear = changed(worker, offer={"price": 5.0})
    one = only(judged(dear, job_config(resources=resources)), checks.OFFER_PRICE)
    assert "its price is 5, and the job pays 4 at most" in one.what
    assert one.mend == "lower offer.price to 4, or raise scheduler.job.resources.worker_price.max to 5"


def test_a_floor_that_the_job_will_bid_in_time(worker: WorkerConfig) -> None:
    price = {"bid": 2, "max": 9}
    resources = {"worker": {"memory": 0.1}, "parameter_server": {"memory": 0.1}}
    prices = {"worker_price": price, "parameter_server_price": price}
    choosy = changed(worker, offer={"floor": 3.0, "price": 3.0})
    first, second = judged(choosy, job_config(resources={**resources, **prices}))
    one = only([first], checks.OFFER_PRICE)
    assert (one.severity, second.severity) == ("note", "note")
    assert "it will, once the job has raised its bid towards 9" in one.what
    never = {name: {**price, "raise_after_s": None} for name in prices}
    assert [one.severity for one in judged(choosy, job_config(resources={**resources, **never}))] == [
        "error",
        "error",
    ]


def test_a_price_that_is_not_talked_about(worker: WorkerConfig) -> None:
    """Without counter-offers a bid below the price is not answered."""
    prices = {"worker_price": {"bid": 2, "max": 2}, "parameter_server_price": {"bid": 9, "max": 9}}
    resources = {"worker": {"memory": 0.1}, "parameter_server": {"memory": 0.1}, **prices}
    silent = changed(worker, offer={"price": 5.0, "counter": False})
    one = only(judged(silent, job_config(resources=resources)), checks.OFFER_PRICE)
    assert "below this worker's price of 5 and the job bids 2" in one.what
    assert "set offer.counter = true" in one.mend


def test_what_the_machine_does_not_have_is_not_offered(worker: WorkerConfig) -> None:
    small = DetectedMachine(1.0, "", 0.05, "", 50.0, "")
    first, second = judged(worker, job_config(), small)
    assert only([first], checks.OFFER_RESOURCES).what.endswith("(memory: 0.1 is asked for, 0 offered)")
    assert second.check == checks.OFFER_RESOURCES


@pytest.mark.parametrize(("asked_gb", "terms"), [(24, [None, None]), (40, ["resources", None])])
def test_gpu_memory_is_offered_as_the_worker_gives_it(
    worker: WorkerConfig, asked_gb: float, terms: list[str | None]
) -> None:
    """Of two GPUs with 16 GB each."""
    two = tuple(Gpu("nvidia", str(index), "A4", 16 * 10**9, "its driver") for index in range(2))
    offering = changed(worker, resources={"gpu": 64.0})
    job = job_config(
        resources={"worker": {"memory": 0.1, "gpu": asked_gb}, "parameter_server": {"memory": 0.1}}
    )
    assert tried(offering, job, DetectedMachine(4.0, "", 8.0, "", 50.0, "", two)) == terms


def test_an_executor_that_the_worker_does_not_have(worker: WorkerConfig) -> None:
    job = job_config(
        resources={
            "worker": {"memory": 0.1},
            "parameter_server": {"memory": 0.1},
            "worker_executor": "jax-trainer",
            "parameter_server_executor": "jax-server",
        }
    )
    first, second = judged(worker, job)
    one = only([first], checks.OFFER_EXECUTOR)
    # good for nothing of that job
    assert (one.severity, second.severity) == ("error", "error")
    assert 'class = "train" and name = "jax-trainer"' in one.mend


def test_a_worker_that_only_trains_lacks_nothing_grave(worker: WorkerConfig) -> None:
    trainer = worker.model_copy(update={"executors": worker.executors[:1]})
    assert only(judged(trainer, job_config()), checks.OFFER_EXECUTOR).severity == "note"


def test_a_job_that_needs_what_the_workers_version_does_not_have(worker: WorkerConfig) -> None:
    older = Abilities("0.0.9", tuple(one for one in OURS.features if one != "bf16"))
    one = only(judged(worker, job_config(precision="bf16"), abilities=older), checks.OFFER_FEATURES)
    assert "bf16" in one.what


def test_an_offer_that_ends_before_the_job_takes_it(worker: WorkerConfig) -> None:
    brief = changed(worker, offer={"temporary_lease_s": 1.0})
    assert "temporary_lease_s" in only(judged(brief, job_config()), checks.LEASE_SHORT).what

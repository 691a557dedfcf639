"""A node that runs, by what its local HTTP says; and what a job's size asks for."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest
from tests.cli.doctor.staging import job_config, only

from hypha.cli.doctor import checks
from hypha.cli.doctor.gathered import Contact, Running
from hypha.cli.doctor.gathering.machine import parameters_of
from hypha.cli.doctor.gathering.own_node import ask_health, counted, read_running, shares_in
from hypha.cli.doctor.judging.job import judge_job, judge_running
from hypha.runtime import in_thread
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.status.snapshot import JobSnapshot

#: as a worker's /metrics has it
METRICS = b"""\
# HELP hypha_lease_renewals_total Renewals.
# TYPE hypha_lease_renewals_total counter
hypha_lease_renewals_total{status="success"} 80.0
hypha_lease_renewals_total{status="failure"} 20.0
# HELP hypha_data_fetch_duration Until a slice was fetched and verified.
# TYPE hypha_data_fetch_duration histogram
hypha_data_fetch_duration_bucket{status="success",le="+Inf"} 20.0
hypha_data_fetch_duration_count{status="success"} 20.0
hypha_data_fetch_duration_sum{status="success"} 1900.0
# HELP hypha_worker_jobs Executors that run.
# TYPE hypha_worker_jobs gauge
hypha_worker_jobs{kind="train"} 1.0
hypha_worker_jobs{kind="aggregate"} 1.0
# HELP hypha_worker_gpu_utilization Of a GPU, 0 to 1.
# TYPE hypha_worker_gpu_utilization gauge
hypha_worker_gpu_utilization{gpu="0"} 0.12
"""


def status(**badput_s: float) -> JobSnapshot:
    """Of a job with two workers for a hundred seconds."""
    spent = {name.replace("_", "-"): seconds for name, seconds in badput_s.items()}
    goodput_s = 200.0 - sum(spent.values())
    report = GoodputReport(100.0, 2, goodput_s, 0.0, spent, 1, 1.0, None, None, 1.0)
    return JobSnapshot(name="digits", goodput=report)


def test_a_job_that_trains_is_no_finding() -> None:
    shares = shares_in(status(waiting_for_theta=20.0, waiting_for_data=10.0, waiting_for_stragglers=10.0))
    assert shares["waiting-for-theta"] == pytest.approx(0.1)
    assert list(judge_running(Running(shares, renewals=100, failed_renewals=5, fetches=20))) == []


def test_workers_that_wait_for_slower_ones() -> None:
    running = Running(shares_in(status(waiting_for_stragglers=60.0)))
    assert "30% of the workers' time" in only(judge_running(running), checks.STRAGGLERS).what


def test_workers_that_wait_for_data() -> None:
    only(judge_running(Running(shares_in(status(waiting_for_data=60.0)))), checks.WAITING_FOR_DATA)


def test_workers_that_synchronise_more_than_they_train() -> None:
    running = Running(shares_in(status(waiting_for_theta=60.0)))
    only(judge_running(running), checks.SYNCHRONIZATION_OVERHEAD)


def test_what_metrics_count() -> None:
    found = counted({}, METRICS)
    assert (found.renewals, found.failed_renewals, found.fetches, found.mean_fetch_s) == (100, 20, 20, 95.0)
    assert [one.check.name for one in judge_running(found)] == ["renewals-fail", "fetches-fail", "gpu-idle"]


def test_renewals_that_fail() -> None:
    only(judge_running(Running(renewals=100, failed_renewals=20)), checks.RENEWALS_FAIL)
    # three of three may be chance
    assert list(judge_running(Running(renewals=3, failed_renewals=3))) == []


def test_fetches_that_fail_or_take_long() -> None:
    only(judge_running(Running(fetches=20, failed_fetches=10)), checks.FETCHES_FAIL)
    only(judge_running(Running(fetches=20, mean_fetch_s=95.0)), checks.FETCHES_FAIL)


def test_requests_and_offers_of_which_nothing_came() -> None:
    metrics = b"""\
# TYPE hypha_worker_offers_total counter
hypha_worker_offers_total{outcome="price"} 12.0
hypha_worker_offers_total{outcome="duplicate"} 3.0
hypha_worker_offers_total{outcome="resources"} 1.0
"""
    one = only(judge_running(counted({}, metrics)), checks.OFFER_PRICE)
    assert "of 16 requests that this worker has heard none got an offer, 12 of them for price" in one.what
    assert list(judge_running(Running(requests={"price": 12, "offered": 1}))) == []
    only(judge_running(Running(offers={"resources": 4, "late": 1})), checks.OFFER_RESOURCES)
    assert list(judge_running(Running(offers={"not-needed": 4}))) == []


def test_a_gpu_that_idles_while_an_executor_trains() -> None:
    only(judge_running(Running(training=1, gpu_utilization=(0.12, 0.3))), checks.GPU_IDLE)
    assert list(judge_running(Running(training=0, gpu_utilization=(0.0,)))) == []


@pytest.mark.parametrize("body", [b"", b"nonsense", b"{}", METRICS[:300]])
def test_what_counts_nothing_says_nothing(body: bytes) -> None:
    assert counted({}, body).training == 0


@pytest.mark.parametrize("job", [JobSnapshot(name="digits"), status()])
def test_a_job_that_has_lost_nothing(job: JobSnapshot) -> None:
    assert not any(shares_in(job).values())


async def test_a_node_that_says_nothing_of_itself() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert await in_thread(read_running, address, True) == Running()
        assert await ask_health(address) is None


# --- the job's size --------------------------------------------------------------------------------------


def weights(directory: Path, *shapes: list[int]) -> None:
    header = {f"t{number}": {"dtype": "BF16", "shape": shape} for number, shape in enumerate(shapes)}
    encoded = msgspec.json.encode({"__metadata__": {}, **header})
    (directory / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)


def test_numbers_in_a_model_are_counted_by_its_headers(tmp_path: Path) -> None:
    job = job_config(model={"type": "causal-lm", "path": tmp_path})
    assert parameters_of(job) is None
    weights(tmp_path, [3, 4], [5], [])
    assert parameters_of(job) == 18
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert parameters_of(job) is None
    assert parameters_of(job_config()) is None


def test_a_parameter_server_that_is_too_small_for_the_model() -> None:
    job = job_config(resources={"parameter_server": {"memory": 4}})
    one = only(judge_job(job, 10**9, ()), checks.PARAMETER_SERVER_SMALL)
    assert "takes 12 GB at the parameter server" in one.what
    assert list(judge_job(job, 10**8, ())) == []


def test_an_update_that_comes_too_late_over_this_line() -> None:
    slow = (Contact("a", up=1e6, down=4e6),)
    job = job_config(resources={"parameter_server": {"memory": 1}})
    one = only(judge_job(job, 30_000_000, slow), checks.UPDATE_SLOW)
    assert "an update takes 120 s and theta 30 s" in one.what
    assert list(judge_job(job_config(update_encoding="int8"), 8_000_000, slow)) == []

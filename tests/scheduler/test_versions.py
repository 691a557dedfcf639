"""What is told of workers of other versions: once, bounded, and with what to do."""

from __future__ import annotations

import logging

import msgspec
import pytest
from tests.scheduler.test_allocator import SERVER, TRAIN, offer

from hypha import __version__
from hypha.features import NAMES, OURS, Abilities
from hypha.scheduler.status.versions import MAX_WORKERS, StatedVersions

NEEDY = msgspec.structs.replace(TRAIN, needs=("bf16", "multi-label"))
OLD = "12D3KooWoldoldold"


@pytest.fixture
def versions(caplog: pytest.LogCaptureFixture) -> StatedVersions:
    caplog.set_level(logging.INFO, logger="hypha")
    return StatedVersions([NEEDY, SERVER])


def test_what_a_worker_lacks_is_logged_once_with_what_to_do(
    versions: StatedVersions, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        versions.declined(OLD, offer(OLD))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert vars(record)["worker_peer_id"] == OLD
    assert record.getMessage() == (
        "Worker …ldoldold runs a version of Hypha that states none and is not given train jobs, as it "
        "lacks what the job needs: multi-label (a version with it brings labels of several classes a row to "
        f"the floats that binary cross-entropy needs); upgrade it to Hypha {__version__} or later, or leave "
        "the multi-label loss out of the job."
    )
    # after an upgrade that was not enough
    versions.declined(OLD, msgspec.structs.replace(offer(OLD), version="0.0.9", features=()))
    assert "runs Hypha 0.0.9 and is not given train jobs" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


def test_why_a_job_waits_names_workers_until_they_are_leased(versions: StatedVersions) -> None:
    assert versions.shortage("aggregate") == ""
    assert versions.shortage("train") == "it needs multi-label, which older versions of Hypha lack"
    for number in range(5):
        versions.declined(f"worker-{number:08}", offer("W"))
    advice = f"upgrade it to Hypha {__version__} or later, or leave the multi-label loss out of the job"
    assert versions.shortage("train") == (
        f"…00000000, …00000001, …00000002 and 2 more offered, but without multi-label: {advice}"
    )
    for number in range(4):
        versions.leased("train", f"worker-{number:08}", OURS)
    assert versions.shortage("train") == f"…00000004 offered, but without multi-label: {advice}"
    assert versions.shortage("aggregate") == ""


def test_another_version_is_told_once_a_worker(
    versions: StatedVersions, caplog: pytest.LogCaptureFixture
) -> None:
    versions.leased("train", "W-of-the-same", OURS)
    assert caplog.records == []
    for _ in range(2):
        versions.leased("train", OLD, Abilities("9.1\x1b[2J", NAMES))
        versions.leased("aggregate", OLD, Abilities("9.1\x1b[2J", NAMES))
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        f"Worker …ldoldold runs Hypha 9.1\N{REPLACEMENT CHARACTER}[2J, this scheduler {__version__}; it "
        "has all that the job needs."
    )


def test_what_is_remembered_is_bounded(versions: StatedVersions, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(MAX_WORKERS + 50):
        versions.declined(f"worker-{number}", offer("W"))
        versions.leased("aggregate", f"worker-{number}", Abilities())
    assert len(caplog.records) == 2 * MAX_WORKERS
    # of a request that is none of this scheduler's
    versions.declined("X", offer("X", request_id="other"))
    assert len(caplog.records) == 2 * MAX_WORKERS

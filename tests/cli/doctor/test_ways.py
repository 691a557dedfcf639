"""What is made of round trips, rates and sizes of packets: lines that are slow, lossy or narrow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.cli.doctor.staging import only, worker_config
from tests.support.network import Pki

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding
from hypha.cli.doctor.gathered import (
    Contact,
    DatasetObservations,
    MachineObservations,
    NetworkObservations,
    Provider,
)
from hypha.cli.doctor.judging.job import judge_dataset
from hypha.cli.doctor.judging.network import judge_network
from hypha.config.models import WorkerConfig

MBIT = 10**6 / 8
MACHINE = MachineObservations(receive_buffer=6_291_456, send_buffer=4_194_304)


@pytest.fixture
def worker(tmp_path: Path) -> WorkerConfig:
    return worker_config(Pki(tmp_path / "pki"), tmp_path)


def findings(worker: WorkerConfig, contact: Contact, line_mbit: float | None = None) -> list[Finding]:
    line = None if line_mbit is None else line_mbit * MBIT
    return list(judge_network(NetworkObservations(gateways=(contact,)), MACHINE, worker, line))


def trips(usual_s: float, *odd: float) -> tuple[float, ...]:
    return (*odd, *[usual_s] * (15 - len(odd)))


def test_a_home_line_is_no_finding(worker: WorkerConfig) -> None:
    usual = trips(0.03, 0.09, 0.3)
    contact = Contact("a", round_trips_s=usual, clock_s=-0.4, mtu=1492, up=5 * MBIT, down=40 * MBIT)
    assert findings(worker, contact) == []


@pytest.mark.parametrize("odd", [(0.4, 0.5, 0.3), (math.inf, 0.5, 1.2, math.inf)])
def test_packets_that_are_lost(worker: WorkerConfig, odd: Sequence[float]) -> None:
    one = only(findings(worker, Contact("a", round_trips_s=trips(0.03, *odd))), checks.NETWORK_UNSTABLE)
    assert f"of 15 small requests to a {len(odd)} were lost or late" in one.what


def test_a_doctor_that_was_held_up_itself_says_nothing_of_the_line(worker: WorkerConfig) -> None:
    held_up = Contact("a", round_trips_s=trips(0.03, 0.4, 0.5, 0.3), late_s=0.3)
    assert findings(worker, held_up) == []


def test_a_tunnel_on_the_way(worker: WorkerConfig) -> None:
    contact = Contact("a", round_trips_s=trips(0.03), mtu=1200)
    assert only(findings(worker, contact), checks.SMALL_MTU).severity == "note"


def test_a_line_that_carries_hardly_anything(worker: WorkerConfig) -> None:
    contact = Contact("a", round_trips_s=trips(0.03), up=0.2 * MBIT, down=4 * MBIT)
    assert "0.20 Mbit/s get through to a" in only(findings(worker, contact), checks.BANDWIDTH_LOW).what


def test_buffers_that_are_smaller_than_bandwidth_times_round_trip(worker: WorkerConfig) -> None:
    # 2 MB may be on their way at once: 80 Mbit/s over 0.2 s
    far = Contact("a", round_trips_s=trips(0.2), up=70 * MBIT, down=40 * MBIT)
    one = only(findings(worker, far), checks.SOCKET_BUFFERS)
    assert "a send buffer of 4194304 bytes carries 84 Mbit/s at most over the 200 ms to a" in one.what
    assert one.mend == '`sysctl -w net.ipv4.tcp_wmem="4096 65536 8388608"`'
    # and somebody who knows what the line can carry is told of both
    assert len(findings(worker, Contact("a", round_trips_s=trips(0.2)), line_mbit=1000)) == 2
    assert findings(worker, Contact("a", round_trips_s=trips(0.002)), line_mbit=1000) == []


def test_leases_that_are_shorter_than_pauses_on_the_way(worker: WorkerConfig) -> None:
    brief = worker.model_copy(update={"offer": worker.offer.model_copy(update={"lease_s": 4.0})})
    assert findings(brief, Contact("a", round_trips_s=trips(0.001))) == []
    one = only(findings(brief, Contact("a", round_trips_s=trips(0.15))), checks.LEASE_SHORT)
    assert "leaves 1 s for a renewal; pauses of 1.2 s are to be expected" in one.what


def test_a_clock_is_not_judged_more_exactly_than_the_round_trip_allows(worker: WorkerConfig) -> None:
    slow = Contact("a", round_trips_s=trips(6.0), clock_s=15.0)
    assert not [one for one in findings(worker, slow) if one.check == checks.CLOCK_SKEW]
    near = Contact("a", round_trips_s=trips(0.1), clock_s=-15.0)
    assert "is 15 s ahead of that of a" in only(findings(worker, near), checks.CLOCK_SKEW).what


def test_a_certificate_that_another_machine_uses(worker: WorkerConfig) -> None:
    here = "/ip4/192.0.2.7/tcp/4001"
    beside = Contact("a", seen_at=("/ip4/192.0.2.7/tcp/4000", "/ip6/2001:db8::7/tcp/4000", here))
    assert findings(worker, beside) == []
    one = only(
        findings(worker, Contact("a", seen_at=("/ip4/192.0.2.8/tcp/1", here))), checks.SAME_CERTIFICATE
    )
    assert "at 192.0.2.8, and sees this machine at 192.0.2.7" in one.what


def test_slices_that_are_too_large_for_the_way_to_their_data_node() -> None:
    provider = Provider("p", "data-1", "00", largest_slice=64 * 10**6, rate=8 * MBIT)
    one = only(judge_dataset(DatasetObservations("digits", (provider,))), checks.SLICE_SLOW)
    assert "up to 64 MB, which take 64 s from data-1 to here" in one.what
    quick = Provider("p", "data-1", "00", largest_slice=64 * 10**6, rate=80 * MBIT)
    assert list(judge_dataset(DatasetObservations("digits", (quick,)))) == []

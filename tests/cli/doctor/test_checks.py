"""Every entry of the specification's troubleshooting section is a check, and every check is staged."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest
from deploy.tables import SYMPTOMS, TROUBLESHOOTING

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import CHECKS, Check, exit_code_of, in_order

#: the specification's "Troubleshooting": symptom -> entry -> the checks that it is
ENTRIES: dict[str, dict[str, tuple[Check, ...]]] = {
    "Nodes cannot connect to the network": {
        "Verify gateway addresses are correct and reachable": (
            checks.GATEWAY_NAME,
            checks.GATEWAY_UNREACHABLE,
            checks.GATEWAY_OTHER,
        ),
        "Check firewall rules allow traffic on configured ports": (
            checks.GATEWAY_UNREACHABLE,
            checks.NOT_DIALABLE,
            checks.EXTERNAL_ADDRESS,
        ),
        "Confirm certificates are valid and trusted": (
            checks.CERTIFICATE_EXPIRED,
            checks.CERTIFICATE_UNUSABLE,
            checks.CERTIFICATE_ROLE,
            checks.KEY_READABLE,
            checks.CRL_OLD,
        ),
        "Review logs for TLS handshake failures": (checks.GATEWAY_TRUST, checks.CLOCK_SKEW),
    },
    "Intermittent disconnections": {
        "Check network stability (packet loss, latency)": (checks.NETWORK_UNSTABLE, checks.LARGE_PACKETS),
        "Verify lease renewal intervals accommodate network conditions": (checks.LEASE_SHORT,),
        "Monitor gateway health and load": (checks.GATEWAY_UNWELL,),
    },
    "Slow training progress": {
        "Monitor straggler workers (check batch processing times)": (checks.STRAGGLERS,),
        "Verify data fetch latency is acceptable": (checks.WAITING_FOR_DATA,),
        "Check network bandwidth utilization": (checks.BANDWIDTH_LOW, checks.SOCKET_BUFFERS),
        "Review GPU utilization on workers": (checks.GPU_IDLE, checks.GPU_UNUSABLE, checks.GPU_DRIVER),
    },
    "High synchronization overhead": {
        "Increase inner steps H": (checks.SYNCHRONIZATION_OVERHEAD,),
        "Check parameter server capacity": (checks.PARAMETER_SERVER_SMALL,),
        "Monitor gradient transmission times": (checks.UPDATE_SLOW,),
    },
    "Workers not receiving offers": {
        "Verify worker connected to network": (checks.GATEWAY_UNREACHABLE,),
        "Check resource advertisement matches scheduler requirements": (
            checks.OFFER_RESOURCES,
            checks.OFFER_EXECUTOR,
            checks.OFFER_FEATURES,
        ),
        "Review pricing thresholds": (checks.OFFER_PRICE,),
    },
    "Lease failures": {
        "Check network connectivity between nodes": (checks.PEER_UNREACHABLE,),
        "Verify lease timeout configuration": (checks.LEASE_SHORT,),
        "Review logs for renewal errors": (checks.RENEWALS_FAIL,),
    },
    "Dataset not found": {
        "Confirm data node announced dataset to DHT": (checks.DATASET_NOT_ANNOUNCED,),
        "Verify dataset name matches scheduler configuration exactly": (checks.DATASET_NAME,),
        "Check data node connectivity to network": (checks.DATASET_UNREACHABLE,),
    },
    "Slow data fetches": {
        "Monitor data node bandwidth usage": (checks.SLICE_SLOW, checks.FETCHES_FAIL),
        "Check network path to data node": (checks.DATA_RELAYED,),
        "Consider replicating dataset to additional data nodes": (checks.SLICE_SLOW,),
    },
}
TESTS = sorted(Path(__file__).parent.glob("test_*.py"))


@functools.cache
def staged() -> frozenset[str]:
    """Names of the checks that a test says are found: ``only(..., checks.X)`` or ``among(..., checks.X)``."""
    found = set()
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("only", "among"):
                found.add(ast.unparse(node.args[1]).removeprefix("checks."))
    return frozenset(found)


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_is_staged(name: str) -> None:
    (constant,) = [one for one, value in vars(checks).items() if value is CHECKS[name]]
    assert constant in staged(), f"stage the cause of {name} in a test, and assert what is found with `only`"


def test_every_entry_of_the_specification_is_a_check() -> None:
    titles = {one.title for one in SYMPTOMS}
    assert ENTRIES.keys() <= titles
    for title, entries in ENTRIES.items():
        for entry, answers in entries.items():
            assert answers, entry
            # some answer to several symptoms, and are told once
            assert all(one is CHECKS[one.name] for one in answers), entry
        of_it = {one for one in CHECKS.values() if one.symptom.title == title}
        assert of_it & {one for answers in entries.values() for one in answers}, title


def test_the_page_has_each_symptom_and_each_check_once() -> None:
    page = TROUBLESHOOTING.read_text()
    for symptom in SYMPTOMS:
        assert page.count(f"\n### {symptom.title}\n") == 1
    for name in CHECKS:
        assert page.count(f"\n| `{name}` |") == 1


@pytest.mark.parametrize("check", CHECKS.values(), ids=lambda one: one.name)
def test_a_check_is_said_in_sentences(check: Check) -> None:
    assert check.what[0].islower()
    assert check.why[0].isupper()
    assert not any(text.endswith(".") for text in (check.what, check.why, check.mend))
    assert check.mend.count("`") % 2 == 0


def test_the_gravest_finding_comes_first_and_gives_the_exit_code() -> None:
    note = checks.NOT_CHECKED.found("the network could not be found out")
    warning = checks.DISK_SLOW.found("work_dir is slow")
    error = checks.PORT_IN_USE.found("somebody listens there")
    assert in_order([note, warning, error, note]) == [error, warning, note]
    assert [exit_code_of(some) for some in ([], [note], [note, warning], [warning, error])] == [0, 0, 7, 8]


def test_a_finding_is_one_line_with_what_why_and_what_to_do() -> None:
    line = str(checks.KEY_READABLE.found("others can read the private key k.pem", "`chmod 600 k.pem`"))
    assert line == (
        "error: key-readable: others can read the private key k.pem. Whoever has the key is this node, so a "
        "node refuses to start with it. To mend it: `chmod 600 k.pem`"
    )

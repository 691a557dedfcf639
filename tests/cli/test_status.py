"""``hypha status`` and ``hypha replay`` as programs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from hypha.journal import Journal, JournalEntry
from hypha.messages import ExecutorDescriptor, HealthReport, Resources
from hypha.rules.leases import Freed, Lease, Tick
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.leasing.allocator import Allocator
from hypha.scheduler.status.snapshot import (
    ConnectionSnapshot,
    JobSnapshot,
    LeaseSnapshot,
    LogLine,
    SliceCounts,
    WorkerSnapshot,
)
from hypha.telemetry import serve_http
from hypha.telemetry.page import PageFeed, page_routes
from hypha.worker.leasing.given import GivenLease, GivenLeases

TRAINING = JobSnapshot(
    name="digits",
    state="training",
    round=3,
    rounds=20,
    loss=0.4123,
    message="all is well",
    workers=(WorkerSnapshot(peer="12D3KooWabcdefgh", state="training", batches=5, batch_size=16),),
    held=(
        LeaseSnapshot("0123456789abcdef", "12D3KooWabcdefgh", "train", 2.5, 4.0, expires_in_s=7.2),
        LeaseSnapshot("fedcba9876543210", "12D3KooWnewernew", "aggregate", version="0.2.1"),
    ),
    version="0.2.1",
    slices=SliceCounts(3, 2, 1),
    connections=(
        ConnectionSnapshot(
            "12D3KooWgatewayy", "relayed", roles=("gateway",), round_trip_s=0.0123, name="gw-1"
        ),
    ),
    refused={"stale round": 3},
    goodput=GoodputReport(
        10.0, 4, 30.0, 0.0, {"waiting-for-data": 8.0, "paused": 2.0}, 9, 1.0, None, None, 1.0
    ),
    warnings=(LogLine(1, 1_700_000_000.0, "warn", "hypha.scheduler", "A lease was lost", "12D3KooWabc"),),
)

LEASE = Lease("l", "r", "s", ExecutorDescriptor(kind="train", name="x"), Resources(cpu=1.0), 1.0, 2.0)


def health() -> HealthReport:
    return HealthReport(healthy=True, component="hypha-scheduler", version="1", peer="p", uptime_s=1.0)


async def hypha(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(60):
        return await trio.run_process(
            [sys.executable, "-m", "hypha.cli.hypha", *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def test_status_once_and_until_the_end() -> None:
    states: Iterator[JobSnapshot] = iter(())
    current = TRAINING

    def answer() -> JobSnapshot:
        nonlocal current
        current = next(states, current)
        return current

    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_http, "127.0.0.1:0", health, lookups={"status": answer}))
        shown = await hypha("status", address)
        assert shown.returncode == 0, shown.stderr
        headline = (
            "digits training, round 3/20, loss 0.4123, 0 samples/s, 0 samples, 1 workers, 0 leases, 0 s\n"
        )
        told = (
            *(headline, "all is well", "…abcdefgh"),
            *("01234567", "2.5", "7 s", "gw-1 (…gatewayy)", "relayed", "12.3 ms"),
            *("3 available, 2 with workers, 1 used", "3 x stale round", "warn A lease was lost"),
            "goodput 75% of 40 worker seconds; lost: waiting for data 8 s, paused 2 s",
            *("not stated", "0.2.1", "the scheduler runs Hypha 0.2.1; 1 of its workers run other versions"),
        )
        for words in told:
            assert words in shown.stdout.decode(), shown.stdout.decode()

        states = iter([TRAINING, msgspec.structs.replace(TRAINING, state="done", round=20)])
        followed = await hypha("status", f"http://{address}/", "--follow")
        assert followed.returncode == 0, followed.stderr
        # into a pipe goes a line when it happens, and the whole at the end
        lines = followed.stdout.decode().splitlines()
        assert lines[0].startswith("digits training, round 3/20")
        assert lines[0].endswith("all is well")
        assert sum(line.startswith("digits done, round 20/20") for line in lines) == 2

        current = msgspec.structs.replace(TRAINING, state="failed", message="nobody offers a GPU")
        failed = await hypha("status", address, "-f")
        assert failed.returncode == 5
        assert failed.stderr.decode().strip().endswith("nobody offers a GPU")
        nursery.cancel_scope.cancel()


async def test_beyond_loopback_it_needs_the_token(tmp_path: Path) -> None:
    (tmp_path / "page-token").write_text("a-token-that-nobody-guesses\n")
    feed = PageFeed(lambda: lambda: ())
    routes = page_routes(feed, lambda: TRAINING, "a-token-that-nobody-guesses")
    async with trio.open_nursery() as nursery:
        address = await nursery.start(partial(serve_http, "127.0.0.1:0", health, routes=routes))
        refused = await hypha("status", address)
        assert (refused.returncode, "--token FILE" in refused.stderr.decode()) == (1, True)
        shown = await hypha("status", address, "--token", str(tmp_path / "page-token"))
        assert (shown.returncode, "all is well" in shown.stdout.decode()) == (0, True)
        nursery.cancel_scope.cancel()
    missing = await hypha("status", address, "--token", str(tmp_path / "nothing"))
    assert "the token cannot be read" in missing.stderr.decode()


async def test_leases_that_a_worker_has_given_and_that_a_scheduler_holds(tmp_path: Path) -> None:
    given = GivenLeases(
        state="is drained, and makes no new offers",
        free=Resources(cpu=2.0),
        leases=(
            GivenLease(
                lease="0123456789abcdef",
                scheduler="12D3KooWabcdefgh",
                name="lab",
                kind="train",
                executor="diloco-transformer",
                state="bound",
                price=1.5,
                resources=Resources(cpu=1.0, memory=4.0),
                expires_in_s=12.3,
                job="job-1",
            ),
        ),
    )
    async with trio.open_nursery() as nursery:
        local = partial(serve_http, "127.0.0.1:0", health, lookups={"leases": lambda: given})
        shown = await hypha("leases", await nursery.start(local))
        assert shown.returncode == 0, shown.stderr
        told = (
            "the worker is drained, and makes no new offers; free are cpu=2",
            "01234567",
            "lab (…abcdefgh)",
        )
        for words in (*told, "train (diloco-transformer)", "cpu=1 memory=4", "1.5", "12 s", "job-1"):
            assert words in shown.stdout.decode(), shown.stdout.decode()
        held = (*TRAINING.held, LeaseSnapshot("l", "12D3KooWgoinggoo", "train", leaves_in_s=7.0))
        job = msgspec.structs.replace(TRAINING, held=held)
        of_job = partial(serve_http, "127.0.0.1:0", health, lookups={"status": lambda: job})
        shown = await hypha("leases", await nursery.start(of_job))
        assert shown.returncode == 0, shown.stderr
        for words in ("job digits holds 3 leases", "…goinggoo", "leaves in 7 s", "cpu=4", "2.5", "held"):
            assert words in shown.stdout.decode(), shown.stdout.decode()
        nursery.cancel_scope.cancel()
    unset = tmp_path / "worker.toml"
    unset.write_text(
        'cert_pem = "c.pem"\nkey_pem = "k.pem"\ntrust_pem = "t.pem"\n'
        'gateway_addresses = ["/ip4/192.0.2.1/tcp/8080"]\n'
    )
    refused = await hypha("leases", "-c", str(unset))
    assert (refused.returncode, "its http_address is not set" in refused.stderr.decode()) == (1, True)
    missing = await hypha("peers", "-c", str(tmp_path / "nothing.toml"))
    assert (missing.returncode, "name the configuration of a component" in missing.stderr.decode()) == (
        2,
        True,
    )


async def test_a_worker_says_what_it_has_and_how_it_is_enforced() -> None:
    def of_a_worker() -> HealthReport:
        details = {"resource cpu": "2 offered; there: 2 cores", "limit memory": "cgroup v1"}
        return msgspec.structs.replace(health(), component="hypha-worker", details=details)

    async with trio.open_nursery() as nursery:
        address = await nursery.start(serve_http, "127.0.0.1:0", of_a_worker)
        told = await hypha("status", address)
        nursery.cancel_scope.cancel()
    assert told.returncode == 0, told.stderr
    for text in ("hypha-worker 1: healthy", "limit memory", "2 offered; there: 2 cores"):
        assert text in told.stdout.decode()


async def test_what_is_no_node_is_said() -> None:
    async def foreign(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, foreign, 0, host="127.0.0.1"))
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        other = await hypha("status", address)
        assert (other.returncode, "is not what a node says" in other.stderr.decode()) == (1, True)
        nursery.cancel_scope.cancel()
    gone = await hypha("status", address)
    assert gone.returncode == 1
    assert gone.stderr.decode().startswith(f"error: http://{address}/status does not answer")


@pytest.mark.parametrize(("content", "told"), [(None, "there is no ledger"), (b"{}", "no readable ledger")])
async def test_what_is_no_ledger_is_said(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "ledger.json").write_bytes(content)
    for job in (tmp_path, tmp_path / "ledger.json"):
        refused = await hypha("replay", str(job), "--data", str(tmp_path))
        assert refused.returncode == 1
        assert told in refused.stderr.decode()
        assert "Traceback" not in refused.stderr.decode()


async def test_a_journal_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(file=path)
    Allocator([], journal=journal).handle(Tick(), 1.0)
    journal.close()
    same = await hypha("replay", "--journal", str(path))
    assert same.returncode == 0, same.stderr
    assert b"2 entries of 1 machines: all decide as they did" in same.stdout
    other = JournalEntry(2, 2.0, "allocator", Tick(), (Freed(LEASE),), {})
    path.write_bytes(path.read_bytes() + other.line() + b"\n")
    differs = await hypha("replay", "--journal", str(path))
    assert differs.returncode == 1
    assert b"entry 2: allocator answers" in differs.stdout
    assert b'"Freed"' in differs.stdout
    for arguments in (["--journal", str(path), "--data", "."], [], [str(tmp_path)]):
        assert (await hypha("replay", *arguments)).returncode == 2

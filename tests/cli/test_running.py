"""Signals, exit codes and messages of a running component: a real gateway process, probed and stopped."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.stopwatch import Stopwatch

from hypha.cli.local.network import free_port
from hypha.cli.running import run_until_signal
from hypha.errors import AllocationFailed, ConfigError, Problem

START_S = 60.0


class Gateway:
    """A gateway process and what it said."""

    def __init__(self, directory: Path, pki: Path, port: int) -> None:
        self.log = directory / "gateway.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "hypha.cli.gateway", "run", "--config", "/dev/null"),
                    *("--listen", f"/ip4/127.0.0.1/tcp/{port}"),
                    *("--external", f"/ip4/127.0.0.1/tcp/{port}"),
                    *("--set", "exclude_cidr=[]", "--http", "127.0.0.1:0"),
                    *(f"--set={kind}_pem={pki}/gateway-{kind}.pem" for kind in ("cert", "key", "trust")),
                    f"--set=crls_pem={directory}/crls.pem",  # not there yet, which is said
                ],
                stderr=log,
                stdout=subprocess.PIPE,
                # a shell starts what runs in the background with SIGINT ignored; this must work there too
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
            )

    def entries(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def wait_ready(self) -> str:
        """Its first address with PeerID."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for entry in self.entries():
                if "addresses" in entry:
                    return str(entry["addresses"][0])  # type: ignore[index]
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stopped_within_s(self, number: signal.Signals) -> float:
        """Seconds from the signal to its end, as if it had the machine for itself."""
        began = Stopwatch(self.process.pid)
        self.process.send_signal(number)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        took_s = began.elapsed_s()
        self.process.wait()
        return took_s


StartGateway = Callable[[int], Gateway]


@pytest.fixture
def start_gateway(tmp_path: Path, pki: Path) -> Iterator[StartGateway]:
    started: list[Gateway] = []

    def start(port: int) -> Gateway:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(Gateway(directory, pki, port))
        return started[-1]

    yield start
    for gateway in started:
        gateway.process.kill()
        gateway.process.communicate()


def probe(pki: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = [f"--{kind}={pki}/{name}-{kind}.pem" for kind in ("cert", "key", "trust")]
    return subprocess.run(
        [sys.executable, "-m", "hypha.cli.worker", "probe", *files, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.real
@pytest.mark.timeout(240)
def test_probe_and_stop(start_gateway: StartGateway, pki: Path, strangers: Path) -> None:
    gateway = start_gateway(port := free_port())
    address = gateway.wait_ready()
    plain = f"/ip4/127.0.0.1/tcp/{port}"
    for target in (address, plain):
        well = probe(pki, "worker", target, "--timeout", "30000")
        assert well.returncode == 0, well.stderr
        line = well.stdout.splitlines()[0]
        assert re.fullmatch(
            r"gateway gateway \(…\w{8}\) of Lab, hypha-gateway \S+, round trip [\d.]+ ms: healthy", line
        )
        assert well.stderr == ""

    itself = probe(pki, "gateway", address)
    assert itself.returncode == 1
    assert "probe with another node's certificate" in itself.stderr

    stranger = probe(strangers, "worker", address)
    nobody = probe(pki, "worker", plain.replace(str(port), str(free_port())) + address[len(plain) :])
    for failed, why in (
        (stranger, "of a CA that is not in the trust bundle"),
        (nobody, "nothing listens there (Connection refused)"),
        (itself, "the very certificate this probe uses"),
    ):
        assert failed.returncode == 1
        (line,) = failed.stderr.splitlines()
        assert line.startswith("error: ")
        assert why in line

    assert gateway.stopped_within_s(signal.SIGTERM) < 5
    assert gateway.process.returncode == 128 + signal.SIGTERM


@pytest.mark.loopback
@pytest.mark.timeout(120)
def test_interrupt_and_hangup(start_gateway: StartGateway) -> None:
    gateway = start_gateway(free_port())
    gateway.wait_ready()
    gateway.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + START_S
    while not any("SIGHUP" in str(entry["message"]) for entry in gateway.entries()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert gateway.stopped_within_s(signal.SIGINT) < 5
    assert gateway.process.returncode == 128 + signal.SIGINT
    # lines that are no JSON are lost where logs are collected; and what is wrong with a file is said once
    messages = [str(json.loads(line)["message"]) for line in gateway.log.read_text().splitlines()]
    assert sum("no revocation list" in message for message in messages) == 1


# --- without a process ------------------------------------------------------------------------------------


def test_an_error_in_a_group_of_groups_comes_out_alone() -> None:
    async def service() -> None:
        raise ExceptionGroup("a", [ExceptionGroup("b", [AllocationFailed("nobody offered")])])

    with pytest.raises(AllocationFailed, match="nobody offered"):
        run_until_signal(service)


def test_problems_of_two_tasks_are_told_together() -> None:
    async def service() -> None:
        raise ExceptionGroup("a", [ConfigError([Problem("x", "bad")]), ConfigError([Problem("y", "bad")])])

    with pytest.raises(ConfigError) as caught:
        run_until_signal(service)
    assert [problem.key for problem in caught.value.problems] == ["x", "y"]


def test_a_defect_beside_an_error_is_not_hidden() -> None:
    async def service() -> None:
        raise ExceptionGroup("a", [AllocationFailed("no"), ZeroDivisionError()])

    with pytest.raises(ExceptionGroup) as caught:
        run_until_signal(service)
    assert caught.group_contains(ZeroDivisionError)


def run_script(text: str, number: signal.Signals) -> tuple[int, float, str]:
    """Exit code, seconds from signal to end, and standard error of a script that prints ``ready``."""
    process = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return process.returncode, time.monotonic() - began, errors.decode()


HANGING = """
import time, trio
from hypha.cli.local.network import free_port
from hypha.cli.running import run_until_signal
async def service():
    print("ready", flush=True)
    await trio.to_thread.run_sync(time.sleep, 25)
raise SystemExit(run_until_signal(service, stop_s=0.5))
"""


def test_what_hangs_in_a_thread_is_cut() -> None:
    code, took_s, _ = run_script(HANGING, signal.SIGTERM)
    assert code == 143
    assert 0.4 < took_s < 10


SLOW = """
import trio
from hypha.cli.local.network import free_port
from hypha.cli.running import run_until_signal
async def service():
    print("ready", flush=True)
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.7)
            print("clean", flush=True)
raise SystemExit(run_until_signal(service))
"""


def test_a_clean_end_is_waited_for() -> None:
    code, took_s, _ = run_script(SLOW, signal.SIGINT)
    assert code == 130
    assert took_s > 0.6


@pytest.mark.parametrize(
    ("terminal", "style"), [(True, "auto"), (True, "json"), (False, "auto"), (False, "text")]
)
def test_people_read_text_and_machines_json(terminal: bool, style: str) -> None:
    code = (
        "import logging, trio\n"
        "from hypha.cli.running import run_service\n"
        "from hypha.config.models import GatewayConfig\n"
        f"config = GatewayConfig(cert_pem='c', key_pem='k', trust_pem='t', log_format={style!r},\n"
        "    external_addresses=['/ip4/127.0.0.1/tcp/1'])\n"
        "async def service():\n"
        "    logging.getLogger('hypha.net').info('Hello.')\n"
        "run_service('hypha-gateway', config, service)\n"
    )
    ours, theirs = pty.openpty() if terminal else os.pipe()
    try:
        subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=60, check=True)
        written = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Hello." in written
    as_json = style == "json" or (style == "auto" and not terminal)
    assert written.startswith("{") is as_json


def test_started_without_standard_files_a_gateway_runs(tmp_path: Path, pki: Path) -> None:
    """As some supervisors start a service: nothing that is opened later may take their places."""
    port = free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    config = tmp_path / "gateway.toml"
    lines = [f'{kind}_pem = "{pki / f"gateway-{kind}.pem"}"' for kind in ("cert", "key", "trust")]
    # with the mark of an editor before it
    text = "\n".join([*lines, f'listen_addresses = ["{address}"]', f'external_addresses = ["{address}"]'])
    config.write_text("\ufeff" + text + "\nexclude_cidr = []\n")
    command = f"exec {sys.executable} -m hypha.cli.gateway run --config {config} <&- >&- 2>&-"
    process = subprocess.Popen(["sh", "-c", command])
    try:
        until = time.monotonic() + START_S
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "it ended"
            assert time.monotonic() < until
            time.sleep(0.05)
        for number in range(3):
            assert Path(f"/proc/{process.pid}/fd/{number}").readlink() == Path("/dev/null")
    finally:
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM

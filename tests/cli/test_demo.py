"""The demo: its processes never stay, its failures are told, its end is a trained model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import trio
from tests.support.commands import hypha_in

from hypha.cli.hypha import main
from hypha.cli.local.children import NetworkFailed, children
from hypha.cli.local.network import free_port

ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": ""}


def module(directory: Path, name: str, text: str) -> dict[str, str]:
    """An environment in which ``python -m name`` runs ``text``."""
    (directory / f"{name}.py").write_text(text)
    return {**ENVIRONMENT, "PYTHONPATH": str(directory)}


async def until(reached: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        for _ in itertools.count():
            if reached():
                return
            await trio.sleep(0.02)


def says(log: Path, text: str) -> Callable[[], bool]:
    return lambda: text in log.read_text()


def gone(pid: int) -> bool:
    """Ended, if perhaps not yet reaped by whoever inherited it."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(f"child {child.pid}", flush=True)
time.sleep(60)
"""


async def test_a_process_that_ignores_sigterm_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypha.cli.local.children.GRACE_S", 0.3)
    async with children(tmp_path, module(tmp_path, "stubborn", STUBBORN)) as group:
        child = await group.start("stubborn", "stubborn")
        await until(says(child.log, "child "))
        grandchild = int(child.log.read_text().split()[1])
    await until(lambda: gone(grandchild))
    assert not psutil.pid_exists(child.process.pid)


async def test_none_is_left_when_the_block_is_cancelled(tmp_path: Path) -> None:
    environment = module(tmp_path, "sleeper", "import time; print('up', flush=True); time.sleep(60)")
    with trio.CancelScope() as scope:
        async with children(tmp_path, environment) as group:
            pids = [(await group.start(f"s{number}", "sleeper")).process.pid for number in range(3)]
            await until(says(tmp_path / "logs" / "s2.log", "up"))
            scope.cancel()
            await trio.sleep_forever()
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_a_dead_process_is_told_with_its_last_words(tmp_path: Path) -> None:
    text = """if True:
        print('{"level": "info", "message": "starting"}')
        print('{"level": "error", "message": "no room"}')
        raise SystemExit(7)"""
    async with children(tmp_path, module(tmp_path, "failing", text)) as group:
        child = await group.start("worker-1", "failing")
        await child.process.wait()
        with pytest.raises(
            NetworkFailed, match=r"worker-1 ended with exit code 7(.|\n)*error no room"
        ) as caught:
            group.check()
        assert caught.value.exit_code == 7
        with pytest.raises(NetworkFailed, match="evaluate failed with exit code 7"):
            await group.run("evaluate", "failing")


async def test_log_fields_are_read_as_they_come_even_in_halves(tmp_path: Path) -> None:
    async with children(tmp_path, module(tmp_path, "sleeper", "import time; time.sleep(60)")) as group:
        child = await group.start("gateway", "sleeper")
        with child.log.open("a") as log:
            for piece, expected in (
                ('not json\n{"addresses": ["/ip4/', None),
                ('127.0.0.1"]}\n', ["/ip4/127.0.0.1"]),
                ('{"addresses": ["new"]}\n[1]\n', ["new"]),
            ):
                log.write(piece)
                log.flush()
                assert child.look().get("addresses") == expected


def test_a_free_port_is_none_that_an_outgoing_connection_may_take_meanwhile() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {free_port() for _ in range(200)}
    assert max(found) < low
    assert len(found) > 100, "networks that are started at once need different ones"


# --- the whole -------------------------------------------------------------------------------------------


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a path short enough for Unix sockets below it, and an empty ``tmp`` in it."""
    with tempfile.TemporaryDirectory(prefix="hd-", dir="/tmp") as directory:
        (Path(directory) / "tmp").mkdir()
        yield Path(directory)


def processes_in(directory: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(directory / "tmp") in line or str(process.info["cwd"]).startswith(str(directory / "tmp")):
            found.append(line)
    return found


@pytest.mark.fault
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "until",
    ["", "Making certificates", "Preparing", "A data node", "loading", "training, round 1", "Evaluating"],
)
def test_interrupted_at_any_moment_nothing_is_left(short: Path, until: str) -> None:
    with hypha_in(short, "demo", "--workers", "1", "--rounds", "2") as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if until in line:
                break
        demo.send_signal(signal.SIGINT)
        time.sleep(0.1)
        demo.send_signal(signal.SIGINT)  # the impatient do no harm
        rest, _ = demo.communicate(timeout=30)
    assert demo.returncode == 130, rest
    assert processes_in(short) == []
    assert [str(path) for path in short.rglob("*") if path != short / "tmp"] == []


@pytest.mark.real
@pytest.mark.timeout(400)
def test_the_demo_trains_a_model_that_users_can_load(short: Path) -> None:
    with hypha_in(short, "demo", "--summary", "summary.json") as demo:
        output, _ = demo.communicate(timeout=380)
    assert demo.returncode == 0, output
    summary = json.loads((short / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0.95, output
    assert (summary["rounds"], summary["workers"]) == (10, 3)
    assert summary["samples"] >= 10 * 1440 * 0.95
    assert summary["model"] == str(short / "demo" / "model")
    assert processes_in(short) == []
    assert list((short / "tmp").iterdir()) == []
    # the snippet, as printed
    snippet = "\n".join(line[4:] for line in output.splitlines() if line.startswith("    ") or not line)
    ran = subprocess.run(
        [sys.executable, "-c", snippet], cwd=short, capture_output=True, text=True, timeout=100
    )
    labels = json.loads(ran.stdout.strip().splitlines()[-1])
    assert sum(label == position for position, label in enumerate(labels)) >= 8, ran


@pytest.mark.parametrize("command", [["demo"], ["chaos"], ["chaos", "--simulated"]])
def test_without_the_extra_it_says_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
    )
    monkeypatch.setattr("sys.argv", ["hypha", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "torch cannot be imported" in said
    assert "hypha-train[train]" in said
    assert "Traceback" not in said

"""``runtime = "bwrap"``: what an executor sees, reaches and leaves behind, tried by one that looks around."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from tests.support.network import Network
from tests.support.polling import until
from tests.worker.test_jobs import SCRIPT, system
from tests.worker.test_process import GROWS, family, running, train_job

from hypha.config.environment import child_environment
from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.errors import ConfigError, HyphaError
from hypha.messages import Finish, Loaded, Progress, RoundStarted
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.processes.isolation import check_bubblewrap, isolate
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import prepare_launch, run_executor

real = pytest.mark.real


@dataclass
class Place:
    """A worker's directories, with a job of its own, one of another scheduler, and secrets."""

    config: WorkerConfig
    directory: JobDirectory
    other: JobDirectory
    executor: ExecutorConfig

    def launch(self, script: str, *args: str, **environment: str) -> Launch:
        (self.config.work_dir.parent / "program").mkdir(exist_ok=True)
        program = self.config.work_dir.parent / "program" / "script.py"
        program.write_text(textwrap.dedent(script))
        executor = self.executor.model_copy(
            update={"args": ["-u", str(program), *args], "read_only": [program.parent]}
        )
        made = prepare_launch(executor, train_job(), self.directory, child_environment() | environment)
        return isolate(made, executor, self.directory, self.config)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    key = tmp_path / "node-key.pem"
    key.write_text("the owner's key")
    config = WorkerConfig.model_validate(
        {
            "cert_pem": tmp_path / "cert.pem",
            "key_pem": key,
            "trust_pem": tmp_path / "trust.pem",
            "gateway_addresses": ["/ip4/192.0.2.1/tcp/1"],
            "work_dir": tmp_path / "work",
        }
    )
    directory, other = JobDirectory.create(config.work_dir), JobDirectory.create(config.work_dir)
    executor = ExecutorConfig(kind="train", name="toy", runtime="bwrap", cmd=sys.executable)
    yield Place(config, directory, other, executor)
    directory.remove()
    other.remove()


@contextmanager
def listening() -> Iterator[tuple[int, str]]:
    """A TCP port, and the name of an abstract Unix socket, of this machine."""
    name = f"hypha-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        yield server.getsockname()[1], name


LOOKS_AROUND = """
import ctypes, json, os, socket, sys

def tried(action):
    try:
        result = action()
        return result if isinstance(result, (str, list, bool, int)) else "done"
    except BaseException as exc:
        return f"{type(exc).__name__}"

def write(path):
    with open(path, "a") as file: file.write("x")

def connect(family, address):
    with socket.socket(family) as one: one.settimeout(5); one.connect(address)

key, work_dir, other, port, abstract, worker = sys.argv[1:]
job = os.environ["WORK_DIR"]
libc = ctypes.CDLL(None, use_errno=True)
print(json.dumps({
    "key": tried(lambda: open(key).read()),
    "work_dir": tried(lambda: os.listdir(work_dir)),
    "other job": tried(lambda: os.listdir(other)),
    "home": tried(lambda: os.listdir(os.environ["HOME"])),
    "root's home": tried(lambda: os.listdir("/root/.ssh")),
    "shadow": tried(lambda: open("/etc/shadow").read()),
    "docker": tried(lambda: os.listdir("/run")),
    "environ": tried(lambda: open(f"/proc/{worker}/environ").read()),
    "processes": len([one for one in os.listdir("/proc") if one.isdigit()]),
    "kill": tried(lambda: os.kill(int(worker), 0)),
    "tcp": tried(lambda: connect(socket.AF_INET, ("127.0.0.1", int(port)))),
    "abstract": tried(lambda: connect(socket.AF_UNIX, "\\0" + abstract)),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "usr": tried(lambda: write("/usr/mark")),
    "hypha": tried(lambda: write(os.path.join(sys.prefix, "mark"))),
    "sysctl": tried(lambda: open("/proc/sys/kernel/core_pattern", "a").close()),
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")][0],
    "namespaces": libc.unshare(0x10000000),
    "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "slice chmod": tried(lambda: os.chmod(f"{job}/slices/0", 0o600)),
    "slice write": tried(lambda: write(f"{job}/slices/0")),
    "slice read": tried(lambda: open(f"{job}/slices/0").read()),
    "slices": tried(lambda: os.rename(f"{job}/slices", f"{job}/gone")),
    "artifacts": tried(lambda: write(f"{job}/artifacts/mark")),
    "outgoing": tried(lambda: write(f"{job}/outgoing/mark")),
    "temporary": tried(lambda: write("/tmp/mark")),
    "secrets": sorted(name for name in os.environ if "TOKEN" in name or "HF" in name or "SECRET" in name),
    "devices": sorted(os.listdir("/dev")),
}))
"""


@real
async def test_an_isolated_executor_sees_its_job_and_nothing_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "the owner's")
    cached = place.config.work_dir / "cached"
    cached.write_text("slice")
    cached.chmod(0o400)
    os.link(cached, place.directory.part("slices") / "0")
    with listening() as (port, abstract):
        made = place.launch(
            LOOKS_AROUND,
            str(place.config.key_pem), str(place.config.work_dir), str(place.other.path), str(port), abstract,
            str(os.getpid()), HF_HOME="/root/hub", CUDA_VISIBLE_DEVICES="",
        )  # fmt: skip
        ended = await run_executor(made, trio.Event(), 5.0)
    assert ended.code == 0, ended.tail
    seen: dict[str, Any] = json.loads(ended.tail.splitlines()[-1])
    missing = ("key", "other job", "root's home", "shadow", "docker", "environ")
    assert {name: seen[name] for name in missing} == dict.fromkeys(missing, "FileNotFoundError")
    assert seen["work_dir"] == [place.directory.path.name]
    assert seen["home"] == []
    assert seen["processes"] <= 4
    assert seen["kill"] == "ProcessLookupError"
    assert (seen["tcp"], seen["abstract"]) == ("ConnectionRefusedError", "ConnectionRefusedError")
    assert seen["interfaces"] == ["lo"]
    refused = ("usr", "hypha", "sysctl", "slice chmod", "slice write", "slices", "artifacts")
    assert all(seen[name] in ("OSError", "PermissionError") for name in refused), seen
    assert seen["slice read"] == "slice"
    assert (seen["outgoing"], seen["temporary"]) == ("done", "done")
    assert (seen["namespaces"], seen["mount"]) == (-1, -1)
    assert int(seen["capabilities"], 16) == 0
    assert seen["secrets"] == []
    assert not any(name.startswith(("nvidia", "dri", "kfd", "sd", "vd", "mem")) for name in seen["devices"])
    assert cached.read_text() == "slice"


@real
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("import os; os.execv('/nowhere', ['x'])", 1),
    ],
)
async def test_it_ends_as_any_executor_does(place: Place, script: str, code: int) -> None:
    assert (await run_executor(place.launch(script), trio.Event(), 1.0)).code == code


@real
async def test_it_is_told_to_end_and_ends_by_itself(place: Place) -> None:
    script = """
        import os, signal, time
        def end(*_): print("good bye", flush=True); os._exit(3)
        signal.signal(signal.SIGTERM, end)
        open("pids", "w").write("ready")
        time.sleep(600)
    """
    stop = trio.Event()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            ended = await run_executor(place.launch(script), stop, 30.0)
            assert (ended.code, ended.stopped, ended.tail) == (3, True, "good bye")

        nursery.start_soon(run)
        await until((place.directory.path / "pids").exists, 20)
        stop.set()


@real
@pytest.mark.parametrize("how", ["kill", "keeper", "exit"])
async def test_nothing_of_it_is_left_wherever_it_hides(place: Place, how: str) -> None:
    """With children that left its session and its process group, also where its keeper is killed."""
    kill = trio.Event()
    async with trio.open_nursery() as nursery:
        made = place.launch(GROWS, "exit" if how == "exit" else "deaf")

        async def run(*, task_status: trio.TaskStatus[int]) -> None:
            begun = replace(made, on_start=task_status.started)
            await run_executor(begun, trio.Event(), 60.0, kill=kill)

        keeper = await nursery.start(run)
        await family(place.directory.path)
        below = psutil.Process(keeper).children(recursive=True) if running(keeper) else []
        if how == "kill":
            kill.set()
        elif how == "keeper":
            assert len(below) >= 5
            os.kill(keeper, signal.SIGKILL)
    await until(lambda: not any(running(one.pid) for one in below), 10)


@real
@pytest.mark.loopback
async def test_a_job_trains_in_isolation(tmp_path: Path) -> None:
    network = Network(tmp_path / "pki")
    executors = [
        {
            "class": "train",
            "name": "echo",
            "runtime": "bwrap",
            "cmd": sys.executable,
            "args": [str(SCRIPT), "{SOCKET_PATH}", "echo"],
            "read_only": [SCRIPT.parent],
        }
    ]
    async with system(network, tmp_path, executors=executors) as made:
        scheduler = made.scheduler
        offer = await scheduler.lease("train", "echo", "r1")
        await scheduler.dispatch(offer, made.train())
        await until(lambda: bool(scheduler.heard(Loaded)), 30)
        await scheduler.theta(made.worker, 0)
        await until(lambda: len(scheduler.updates) == 1, 30)
        assert scheduler.heard(RoundStarted)
        await until(lambda: bool(scheduler.reports))
        assert isinstance(scheduler.reports[0].progress, Progress)
        await scheduler.steer(made.worker, "train", Finish())
        assert (await scheduler.exit()).exit_code == 0
        await until(lambda: made.directories() == [])


@real
def test_bubblewrap_works_here(place: Place) -> None:
    check_bubblewrap(place.config.model_copy(update={"executors": [place.executor]}))


def test_where_bubblewrap_is_not_to_be_had_it_is_said_at_the_start(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = place.config.model_copy(update={"executors": [place.executor]})
    broken = tmp_path / "bin" / "bwrap"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    check_bubblewrap(place.config)
    with pytest.raises(ConfigError, match=r"executors\[0\].runtime.*No permissions to create new namespace"):
        check_bubblewrap(isolated)
    broken.unlink()
    with pytest.raises(ConfigError, match=r"not installed.*apt-get install bubblewrap"):
        check_bubblewrap(isolated)


def test_neither_the_whole_machine_nor_the_workers_own_is_shown(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "hypha.worker.processes.isolation.shutil.which", lambda name, path=None: f"/usr/bin/{name}"
    )
    made = prepare_launch(place.executor, train_job(), place.directory, child_environment())
    everything = place.executor.model_copy(update={"read_only": [Path("/")]})
    with pytest.raises(HyphaError, match="all of /"):
        isolate(made, everything, place.directory, place.config)
    # what is read-only may hold what is not to be seen: that is covered again
    above = place.executor.model_copy(update={"read_only": [tmp_path]})
    argv = isolate(made, above, place.directory, place.config).argv
    key, work = str(place.config.key_pem.resolve()), str(place.config.work_dir.resolve())
    shown = argv.index(str(tmp_path))
    assert argv[argv.index(key) - 2 : argv.index(key)] == ("--ro-bind", os.devnull)
    assert argv[argv.index(work) - 1] == "--tmpfs"
    assert shown < argv.index(work) < argv.index(str(place.directory.path))


def test_it_is_started_cold_and_gpus_are_for_who_pays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hypha.worker.processes.isolation.shutil.which", lambda name, path=None: f"/usr/bin/{name}"
    )
    monkeypatch.setattr(
        "hypha.worker.processes.isolation.glob",
        lambda pattern: ["/dev/nvidia0"] if pattern == "/dev/nvidia*" else [],
    )
    own = place.executor.model_copy(update={"cmd": None})
    made = prepare_launch(own, train_job(), place.directory, child_environment())
    assert made.own
    for visible, shown in (("0", True), ("", False)):
        environment = {**made.environment, "CUDA_VISIBLE_DEVICES": visible}
        launch = isolate(replace(made, environment=environment), own, place.directory, place.config)
        assert not launch.own
        assert ("/dev/nvidia0" in launch.argv) is shown

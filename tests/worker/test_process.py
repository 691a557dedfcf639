"""Real child processes: output, exit codes, stops, and that nothing of them is left."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from hypha.config.environment import child_environment
from hypha.config.models import ExecutorConfig
from hypha.errors import ExecutorFailed
from hypha.messages import (
    AggregateJob,
    ExecutorDescriptor,
    HuggingFace,
    ModelSpec,
    PeerRef,
    PreprocessorSpec,
    TrainJob,
)
from hypha.telemetry.logs import ContextFilter, bind
from hypha.worker.jobs.directory import JobDirectory
from hypha.worker.limits.limits import thread_environment
from hypha.worker.processes.keepers import KEEPER, MAX_LINE_BYTES, Launch
from hypha.worker.processes.process import (
    TAIL_LINES,
    Supervision,
    prepare_launch,
    run_executor,
    secrets_of,
    without_secrets,
)

TOKEN = "hf_very_secret"


def train_job(arguments: dict[str, str] | None = None) -> TrainJob:
    return TrainJob(
        job_id="job-1",
        generation=2,
        executor=ExecutorDescriptor(kind="train", name="toy"),
        me="me",
        scheduler=PeerRef(peer="scheduler"),
        parameter_server=PeerRef(peer="ps"),
        model=ModelSpec(
            task="causal-lm",
            source=HuggingFace(repository="acme/model", token=TOKEN),
            arguments=dict(arguments or {}),
        ),
        preprocessor=PreprocessorSpec(
            kind="tokenizer", source=HuggingFace(repository="acme/tok", token=TOKEN + "2")
        ),
        dataset="digits",
        batch_size=4,
    )


def launch(tmp_path: Path, script: str, *args: str, secrets: tuple[str, ...] = ()) -> Launch:
    return Launch(
        job_id="job-1",
        argv=(sys.executable, "-u", "-c", textwrap.dedent(script), *args),
        environment=child_environment(),
        work_dir=tmp_path,
        secrets=secrets,
    )


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    with trio.fail_after(within_s):
        while not condition():
            await trio.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_exit_code_and_last_lines_are_reported(tmp_path: Path) -> None:
    script = """
        import sys
        for number in range(200): print("line", number)
        sys.stderr.write("the end\\n"); sys.exit(7)
    """
    ended = await run_executor(launch(tmp_path, script), trio.Event(), 1.0)
    assert (ended.code, ended.stopped) == (7, False)
    lines = ended.tail.splitlines()
    assert len(lines) == TAIL_LINES
    assert lines[-2:] == ["line 199", "the end"]


async def test_death_by_signal_is_told_apart_from_an_exit_code(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert (await run_executor(launch(tmp_path, script), trio.Event(), 1.0)).code == -signal.SIGSEGV


async def test_command_that_does_not_exist(tmp_path: Path) -> None:
    bad = Launch("job-1", ("/nowhere/executor",), child_environment(), tmp_path)
    ended = await run_executor(bad, trio.Event(), 1.0)
    assert ended.code == 127
    assert "/nowhere/executor" in ended.tail


async def test_output_without_newlines_is_bounded_and_closing_it_early_is_no_crime(tmp_path: Path) -> None:
    script = """
        import os, time
        os.write(1, b"x" * 100_000)
        os.close(1); os.close(2)
        time.sleep(0.3)
    """
    ended = await run_executor(launch(tmp_path, script), trio.Event(), 1.0)
    assert ended.code == 0
    assert max(map(len, ended.tail.splitlines())) <= MAX_LINE_BYTES


async def test_secrets_are_blotted_out_of_output(tmp_path: Path) -> None:
    ended = await run_executor(
        launch(tmp_path, "print('token', 'hf_very_secret')", secrets=(TOKEN,)), trio.Event(), 1.0
    )
    assert ended.tail == "token ***"


GROWS = """
    import os, subprocess, sys, time, signal
    if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    loner = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    open("pids", "w").write(f"{os.getpid()} {child.pid} {loner.pid}\\n")
    if "exit" in sys.argv: sys.exit(0)
    time.sleep(600)
"""


async def family(tmp_path: Path) -> list[int]:
    pids = tmp_path / "pids"
    await until(lambda: pids.exists() and pids.read_text().endswith("\n"))
    return [int(pid) for pid in pids.read_text().split()]


@pytest.mark.parametrize("how", ["polite", "deaf"])
async def test_stop_kills_the_whole_family(tmp_path: Path, how: str) -> None:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            ended = await run_executor(launch(tmp_path, GROWS, how), stop, 0.3)
            assert ended.stopped
            assert ended.code == (-signal.SIGTERM if how == "polite" else -signal.SIGKILL)

        nursery.start_soon(run)
        pids = await family(tmp_path)
        assert all(map(running, pids))
        stop.set()
    assert not any(map(running, pids))


async def test_a_stopped_family_is_killed_with_a_stopped_keeper(tmp_path: Path) -> None:
    kill, ended = trio.Event(), []
    async with trio.open_nursery() as nursery:
        groups: list[int] = []

        async def run(*, task_status: trio.TaskStatus[int]) -> None:
            made = replace(launch(tmp_path, GROWS, "deaf"), on_start=task_status.started)
            ended.append(await run_executor(made, trio.Event(), 60.0, kill=kill))

        groups.append(await nursery.start(run))
        pids = await family(tmp_path)
        for pid in [*groups, *pids]:
            os.kill(pid, signal.SIGSTOP)
        kill.set()
    assert [(one.code, one.stopped) for one in ended] == [(-signal.SIGKILL, False)]
    assert not any(map(running, pids))


async def test_what_an_executor_leaves_behind_is_killed_with_its_end(tmp_path: Path) -> None:
    ended = await run_executor(launch(tmp_path, GROWS, "exit"), trio.Event(), 1.0)
    assert ended.code == 0
    assert not any(map(running, await family(tmp_path)))


async def test_cancelled_worker_leaves_no_executor(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_executor, launch(tmp_path, GROWS, "deaf"), trio.Event(), 60.0)
        pids = await family(tmp_path)
        nursery.cancel_scope.cancel()
    assert not any(map(running, pids))


@pytest.mark.fault
async def test_kill_9_of_the_worker_leaves_no_executor(tmp_path: Path) -> None:
    (tmp_path / "grows.py").write_text(textwrap.dedent(GROWS))
    worker = f"""
import sys, trio
from pathlib import Path
from hypha.config.environment import child_environment
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Supervision, run_executor
launch = Launch("job", (sys.executable, "grows.py", "deaf"), child_environment(), Path({str(tmp_path)!r}))
trio.run(run_executor, launch, trio.Event(), 60.0)
"""
    process = subprocess.Popen([sys.executable, "-c", worker])  # noqa: ASYNC220 - outlives no test
    try:
        pids = await family(tmp_path)
        keeper = psutil.Process(pids[0]).ppid()
        # Longer than trio keeps the idle thread that forked: its end must not look like the worker's.
        await trio.sleep(11)
        assert all(map(running, pids))
    finally:
        process.kill()
        process.wait()
    await until(lambda: not any(map(running, [*pids, keeper])))


@pytest.mark.fault
async def test_kill_9_of_the_keeper_kills_the_executor(tmp_path: Path) -> None:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        groups: list[int] = []
        made = replace(launch(tmp_path, GROWS), on_start=groups.append)
        nursery.start_soon(run_executor, made, stop, 1.0)
        pids = await family(tmp_path)
        os.kill(groups[0], signal.SIGKILL)
        await until(lambda: not running(pids[0]))
    # without a worker that adopts them nobody knows of those that have left the session
    for pid in pids[1:]:
        psutil.Process(pid).kill() if running(pid) else None


ADOPTS = """
import sys, trio
from pathlib import Path
from hypha.config.environment import child_environment
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Supervision, run_executor

async def main():
    supervision = Supervision(adopting=True)
    running = supervision.running
    def launch(*argv):
        return Launch("job", (sys.executable, *argv), child_environment(), Path.cwd())
    async with trio.open_nursery() as nursery:
        stop = trio.Event()
        async def other():
            ended = await run_executor(
                launch("-c", "import time; time.sleep(600)"), stop, 1.0, supervision=supervision
            )
            print("other", ended.code, flush=True)
        nursery.start_soon(other)
        while not running:
            await trio.sleep(0.01)
        print("other keeper", *running, flush=True)
        ended = await run_executor(
            launch("grows.py", "deaf"), trio.Event(), 60.0, supervision=supervision
        )
        print("ended", ended.code, flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        stop.set()

trio.run(main)
"""


async def line_of(stream: trio.abc.ReceiveStream) -> bytes:
    """What a process prints until it ends a line; it may come in pieces."""
    line = b""
    while not line.endswith(b"\n"):
        more = await stream.receive_some()
        assert more, f"it ended after {line!r}"
        line += more
    return line


async def test_whoever_kills_its_keeper_is_found_all_the_same(tmp_path: Path) -> None:
    """In a session of its own, below a process that has ended; other executors are left alone."""
    (tmp_path / "grows.py").write_text(textwrap.dedent(GROWS))
    worker = await trio.lowlevel.open_process(
        [sys.executable, "-c", ADOPTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        pids = await family(tmp_path)
        others = int((await line_of(worker.stdout)).split()[-1])
        os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
        with trio.fail_after(20):
            assert await line_of(worker.stdout) == f"ended {-signal.SIGKILL}\n".encode()
        assert not any(map(running, pids))
        assert running(others)
        assert psutil.Process(others).children()
        await worker.stdin.send_all(b"\n")
        with trio.fail_after(20):
            assert await line_of(worker.stdout) == f"other {-signal.SIGTERM}\n".encode()
            assert await worker.wait() == 0
    finally:
        worker.kill()
        await worker.wait()
        await worker.stdin.aclose()
        await worker.stdout.aclose()


async def test_keeper_starts_fast(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    await run_executor(Launch("job-1", ("/bin/true",), child_environment(), tmp_path), trio.Event(), 1.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time: neither torch nor much else is imported
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert KEEPER.exists()


def test_placeholders_and_environment(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    config = ExecutorConfig(
        kind="train",
        name="toy",
        cmd="/usr/bin/toy",
        args=["--socket={SOCKET_PATH}", "{WORK_DIR}/x", "{JOB_FILE}", "{JOB_JSON}"],
        env={"OUT": "{WORK_DIR}/out", "SOCKET_PATH": "mine"},
    )
    ready = prepare_launch(config, train_job(), directory, {"PATH": "/bin"})
    socket, work = str(directory.socket_path), str(directory.path)
    assert ready.argv[:4] == ("/usr/bin/toy", f"--socket={socket}", f"{work}/x", f"{work}/job.json")
    assert ready.environment == {
        "PATH": "/bin", "OUT": f"{work}/out", "SOCKET_PATH": socket, "WORK_DIR": work
    }  # fmt: skip
    assert TOKEN not in "".join(ready.argv) + (directory.path / "job.json").read_text()
    assert (directory.path / "job.json").read_text() == ready.argv[4]
    assert ready.secrets == (TOKEN, TOKEN + "2")
    directory.remove()


def test_threads_are_those_of_the_lease_unless_the_entry_says_otherwise(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    for own, wanted in (
        ({}, ("4", "4")),
        ({"threads": 2}, ("2", "2")),
        ({"threads": 2, "env": {"OMP_NUM_THREADS": "1"}}, ("1", "2")),
    ):
        config = ExecutorConfig.model_validate(
            {"class": "train", "name": "toy", "cmd": "/usr/bin/toy", **own}
        )
        ready = prepare_launch(config, train_job(), directory, thread_environment(4))
        assert (ready.environment["OMP_NUM_THREADS"], ready.environment["MKL_NUM_THREADS"]) == wanted
    directory.remove()


def test_own_executors_by_default(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    config = ExecutorConfig(kind="aggregate", name="parameter-server")
    argv = prepare_launch(config, train_job(), directory, {}).argv
    assert argv == (sys.executable, "-m", "hypha.executor.parameter_server", str(directory.socket_path))
    directory.remove()


def test_on_several_devices_accelerate_starts_the_training_executor(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    config = ExecutorConfig(kind="train", name="diloco-transformer", accelerate=tmp_path / "two.yaml")
    ready = prepare_launch(config, train_job(), directory, {})
    socket = str(directory.socket_path)
    module = "hypha.executor.launch"
    assert ready.argv == (sys.executable, "-m", module, str(tmp_path / "two.yaml"), socket)
    # a host has nothing to fork for it
    assert not ready.own
    directory.remove()


def test_job_json_too_long_for_an_argument(tmp_path: Path) -> None:
    directory = JobDirectory.create(tmp_path)
    long = train_job({f"argument-{number}": "x" * 100 for number in range(1200)})
    with pytest.raises(ExecutorFailed, match="JOB_FILE"):
        prepare_launch(
            ExecutorConfig(kind="train", name="toy", cmd="toy", args=["{JOB_JSON}"]), long, directory, {}
        )
    prepare_launch(
        ExecutorConfig(kind="train", name="toy", cmd="toy", args=["{JOB_FILE}"]), long, directory, {}
    )
    directory.remove()


def test_all_tokens_are_found_and_removed() -> None:
    job = AggregateJob(
        job_id="job-1",
        generation=0,
        executor=ExecutorDescriptor(kind="aggregate", name="ps"),
        me="me",
        scheduler=PeerRef(peer="scheduler"),
        model=ModelSpec(task="causal-lm", source=HuggingFace(repository="a/b", token="one")),
        restore=HuggingFace(repository="a/c", token="two", filenames=("x",)),
    )
    assert secrets_of(job) == ("one", "two")
    bare = without_secrets(job)
    assert secrets_of(bare) == ()
    assert isinstance(bare, AggregateJob)
    assert bare.restore == HuggingFace(repository="a/c", filenames=("x",))


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HYPHA_KEY", "HYPHA_TELEMETRY_HEADERS", "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS", "GITHUB_TOKEN", "SSH_AUTH_SOCK", "HTTPS_PROXY",
        "PGPASSWORD",
        "DBUS_SESSION_BUS_ADDRESS", "GOOGLE_APPLICATION_CREDENTIALS", "KUBECONFIG", "SOMETHING_NEW",
    ],
)  # fmt: skip
def test_executors_do_not_inherit_secrets(name: str) -> None:
    worker = {"PATH": "/bin", "LC_ALL": "C", name: "x"}
    assert child_environment(worker) == {"PATH": "/bin", "LC_ALL": "C"}


INSPECTED = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("keeper", sys.argv[1])
keeper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keeper)
if sys.argv[2] == "denied":
    keeper.deny_inspection()
print(os.getpid(), flush=True)
sys.stdin.read()
"""
INSPECTS = "import sys; print('HF_TOKEN' in open(f'/proc/{sys.argv[1]}/environ').read())"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@pytest.mark.parametrize("denied", [True, False])
def test_the_environment_of_a_worker_is_not_in_proc_for_its_own_user(tmp_path: Path, denied: bool) -> None:
    """Root may look at everything, so whoever is root becomes nobody."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    module = Path("/tmp") / f"{tmp_path.name}-{os.getpid()}-keeper.py"
    module.write_bytes(KEEPER.read_bytes())
    module.chmod(0o644)
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "cwd": "/", **nobody}
    environment = {"PATH": "/usr/bin", "HF_TOKEN": "x"}
    worker = subprocess.Popen(
        [python, "-I", "-S", "-c", INSPECTED, str(module), "denied" if denied else "as ever"],
        stdin=subprocess.PIPE,
        env=environment,
        **options,
    )
    try:
        assert worker.stdout is not None
        pid = worker.stdout.readline().strip()
        command = [python, "-I", "-S", "-c", INSPECTS, pid]
        looked = subprocess.run(command, stderr=subprocess.PIPE, check=False, **options)
    finally:
        worker.communicate("")
        module.unlink()
    if denied:
        assert "PermissionError" in looked.stderr
    else:
        assert looked.stdout == "True\n"


async def test_each_line_of_output_says_of_which_job_worker_and_round_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="hypha.worker.executor")
    fields: dict[str, object] = {"job_id": "job-1", "worker_peer_id": "W"}
    supervision = Supervision()
    seen = supervision.running
    script = """
        import time
        print("WARNING it is slow", flush=True)
        time.sleep(60)
    """
    made = replace(launch(tmp_path, script), kind="aggregate")
    caplog.handler.addFilter(ContextFilter())
    bind(job_id="job-1", worker_peer_id="W")
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_executor, made, stop, 1.0, supervision=supervision))
        await until(lambda: any("it is slow" in record.message for record in caplog.records))
        assert list(seen.values()) == ["aggregate"]
        assert running(next(iter(seen)))
        stop.set()
    assert not seen
    line = next(record for record in caplog.records if "it is slow" in record.message)
    assert line.levelno == logging.WARNING
    assert {name: getattr(line, name) for name in fields} == fields

"""Executors that a host has forked: like those that are started, however anything of them ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
from tests.executor.bridge_peer import Network
from tests.support.host import run_environment, shared_host
from tests.worker.test_limits import EATS
from tests.worker.test_process import GROWS, family, running, until

from hypha.config.environment import child_environment, inherited_state
from hypha.config.models import ExecutorConfig, WorkerConfig
from hypha.executor import host as host_module
from hypha.messages import ExecutorDescriptor, ForkRequest, ModelSpec, PeerRef, Resources, TrainJob
from hypha.processes import keeper
from hypha.worker.limits.cgroups import usable_cgroups
from hypha.worker.limits.limits import Limits, Means
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, Supervision, run_executor
from hypha.worker.processes.warm import ForkedKeeper, OwnHost, SharedHost, open_host

MODULE = "hypha.executor.training"
TOKEN = "hf_very_secret"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts are for Linux")


@pytest.fixture
def bridges(tmp_path: Path) -> Iterator[Network]:
    """Bridges that are closed after the test."""
    network = Network(tmp_path)
    yield network
    network.close()


def launch(bridges: Network, script: str, *options: str, **environment: str) -> Launch:
    """A training executor that runs ``script`` where it would build its model."""
    job = TrainJob(
        job_id="job-1",
        generation=0,
        executor=ExecutorDescriptor(kind="train", name="toy"),
        me=f"me-{len(bridges.bridges)}",
        scheduler=PeerRef(peer="scheduler"),
        parameter_server=PeerRef(peer="ps"),
        model=ModelSpec(
            task="torch",
            entrypoint="tests.support.probes:probe",
            arguments={"script": textwrap.dedent(script)},
        ),
        dataset="digits",
        batch_size=4,
    )
    directory = bridges.add(job).directory
    return Launch(
        job_id="job-1",
        argv=(sys.executable, "-m", MODULE, str(directory / "bridge.sock")),
        environment={**child_environment(run_environment()), **environment},
        work_dir=directory,
        keeper_options=options,
        own=MODULE,
        torch_only=True,
    )


class Sure(SharedHost):
    """Fails where an executor would be started instead. The host of a busy machine takes long to import."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.patience_s = 100.0

    async def fork(self, launch: Launch) -> ForkedKeeper | None:
        keeper = await super().fork(launch)
        assert keeper is not None
        return keeper


async def run(made: Launch, **more: trio.Event) -> Exit:
    stop = more.get("stop", trio.Event())
    return await run_executor(
        made, stop, 0.3, kill=more.get("kill"), supervision=Supervision(Sure(shared_host()))
    )


async def test_exit_code_output_and_command_line_are_those_of_a_started_one(bridges: Network) -> None:
    script = """
        import os, sys
        print(open("/proc/self/cmdline").read().replace("\\0", " ").strip())
        print(open(f"/proc/{os.getppid()}/cmdline").read().replace("\\0", " ").strip())
        sys.stderr.write("the end\\n"); sys.exit(7)
    """
    made = launch(bridges, script)
    ended = await run(made)
    assert (ended.code, ended.stopped) == (7, False)
    own, keepers, last = ended.tail.splitlines()
    assert own == " ".join(made.argv)
    assert keepers == f"{sys.executable} {keeper.__file__} -- {own}"
    assert last == "the end"


@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        ("import os; os.kill(os.getpid(), 11)", -signal.SIGSEGV, ""),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
        ("raise ValueError('no such thing')", 5, "no such thing"),
        ("import sys; sys.exit('a word')", 1, "a word"),
        ("import os; os._exit(0)", 0, ""),
    ],
)
async def test_ends_are_told_apart(bridges: Network, script: str, code: int, says: str) -> None:
    ended = await run(launch(bridges, script))
    assert ended.code == code, ended.tail
    assert says in ended.tail


STATE = """
    import json, os, random, signal, sys, tempfile
    import numpy as np, torch
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try: descriptors[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError: pass
    print(json.dumps({
        "random": [random.random(), float(np.random.rand()), os.urandom(8).hex()],
        "threads": torch.get_num_threads(),
        "descriptors": descriptors,
        "handlers": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)],
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "environment": dict(os.environ),
        "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0], "tmp": tempfile.gettempdir(),
        "group": os.getpgid(0) == os.getsid(0) == os.getppid(),
    }), flush=True)
    os._exit(0)
"""


async def test_each_has_a_state_of_its_own(bridges: Network, tmp_path: Path) -> None:
    made = [
        launch(bridges, STATE, OMP_NUM_THREADS=str(count), TMPDIR=str(tmp_path), MINE="yes")
        for count in (1, 2)
    ]
    said = [json.loads((await run(one)).tail) for one in made]
    assert not set(said[0]["random"]) & set(said[1]["random"])
    assert [one["threads"] for one in said] == [1, 2]
    for one, its in zip(made, said, strict=True):
        assert its["environment"] == dict(one.environment)
        assert TOKEN not in str(its["environment"])
        assert (its["cwd"], its["path"]) == (str(one.work_dir), str(one.work_dir))
        assert its["argv"][1:] == list(one.argv[3:])
        assert its["tmp"] == str(tmp_path)
        assert its["group"]
        assert its["blocked"] == 0
        assert set(its["handlers"]) == {"0"}, "the defaults"
        assert its["descriptors"]["0"] == "/dev/null"
        assert its["descriptors"]["1"] == its["descriptors"]["2"]
        others = [name for number, name in its["descriptors"].items() if int(number) > 2]
        # its connections with the bridge
        assert all(name.startswith(("socket:", "/proc/")) for name in others), its["descriptors"]


@pytest.mark.parametrize("how", ["polite", "deaf"])
async def test_stop_kills_the_whole_family(bridges: Network, how: str) -> None:
    stop = trio.Event()
    made = launch(bridges, f"import sys; sys.argv = [{how!r}]\n" + textwrap.dedent(GROWS))
    async with trio.open_nursery() as nursery:

        async def stopped() -> None:
            ended = await run(made, stop=stop)
            assert ended.stopped
            assert ended.code == (-signal.SIGTERM if how == "polite" else -signal.SIGKILL)

        nursery.start_soon(stopped)
        pids = await family(made.work_dir)
        assert all(map(running, pids))
        stop.set()
    assert not any(map(running, pids))


async def test_a_stopped_family_is_killed_with_a_stopped_keeper(bridges: Network) -> None:
    kill, ended = trio.Event(), []
    made = launch(bridges, GROWS)
    async with trio.open_nursery() as nursery:

        async def killed(*, task_status: trio.TaskStatus[int]) -> None:
            ended.append(
                await run_executor(
                    replace(made, on_start=task_status.started),
                    trio.Event(),
                    60.0,
                    kill=kill,
                    supervision=Supervision(Sure(shared_host())),
                )
            )

        group = await nursery.start(killed)
        pids = await family(made.work_dir)
        for pid in [group, *pids]:
            os.kill(pid, signal.SIGSTOP)
        kill.set()
    assert [(one.code, one.stopped) for one in ended] == [(-signal.SIGKILL, False)]
    assert not any(map(running, pids))


async def test_cancelled_nothing_is_left(bridges: Network) -> None:
    made = launch(bridges, GROWS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, made)
        pids = await family(made.work_dir)
        nursery.cancel_scope.cancel()
    assert not any(map(running, pids))


async def test_resource_limits_hold(bridges: Network) -> None:
    # more than what is shared with the host, which counts as well
    limits = Limits(Means("rlimit", {}), "x", Resources(memory=1))
    script = textwrap.dedent(EATS).replace("range(40)", "range(100)")
    ended = await run(limits.launch(launch(bridges, script)))
    assert ended.code, ended.tail
    assert "MemoryError" in ended.tail
    assert "ate it all" in (await run(launch(bridges, EATS + "    import os; os._exit(0)"))).tail


@pytest.mark.real
async def test_cgroups_hold(bridges: Network) -> None:
    places = usable_cgroups()
    if "memory" not in places:
        pytest.skip("no writable cgroup with the memory controller here")
    limits = Limits(Means("cgroup", places), f"hypha-warm-{os.getpid()}", Resources(cpu=1, memory=0.2))
    try:
        ended = await run(limits.launch(launch(bridges, EATS)))
        assert ended.code == -9, ended.tail
        assert "want of memory (its limits: 0.2 GB memory: cgroup" in str(limits.denied())
    finally:
        await limits.remove()


async def test_a_limit_that_cannot_be_set_is_an_end_like_any_other(bridges: Network) -> None:
    ended = await run(launch(bridges, "", "--cgroup", "/nowhere/cgroup.procs"))
    assert ended.code == keeper.CANNOT_EXECUTE
    assert "cannot start hypha.executor.training" in ended.tail


# --- when it is started instead -----------------------------------------------------------------------


def request(**environment: str) -> ForkRequest:
    return ForkRequest(
        module=MODULE,
        arguments=(),
        directory="/",
        environment={"PATH": "/bin", "HOME": "/root", **environment},
        python=sys.executable,
        package=keeper.__file__,
        inherited={"Uid": "0"},
    )


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("PYTHONPATH", "/mine", False),
        ("LD_PRELOAD", "/mine.so", False),
        ("LD_LIBRARY_PATH", "/mine", False),
        ("HF_HOME", "/mine", False),
        ("HOME", "/mine", False),
        ("TORCH_LOGS", "all", False),
        ("CUDA_HOME", "/mine", False),
        ("OMP_PROC_BIND", "true", False),
        ("OMP_NUM_THREADS", "2,4", False),
        ("OMP_NUM_THREADS", "2", True),
        ("CUDA_VISIBLE_DEVICES", "1", True),
        ("HYPHA_STEP_S", "1", True),
        ("PATH", "/mine", True),
        ("SOCKET_PATH", "/mine", True),
    ],
)
def test_what_is_read_at_import_cannot_be_given_to_a_fork(name: str, value: str, fits: bool) -> None:
    environment = {"PATH": "/bin", "HOME": "/root"}
    why = host_module.unlike(request(**{name: value}), environment, {"Uid": "0"})
    assert (name in why) is not fits, why
    # and the other way round: the host has what the executor has not
    why = host_module.unlike(request(), {**environment, name: value}, {"Uid": "0"})
    assert bool(why) is not (fits or name == "OMP_NUM_THREADS"), why


def test_another_installation_or_inheritance_is_another_executor() -> None:
    environment = dict(request().environment)
    assert host_module.unlike(request(), environment, {"Uid": "0"}) == ""
    assert "Uid" in host_module.unlike(request(), environment, {"Uid": "7"})
    for other in (replaced(python="/usr/bin/python"), replaced(package="/other/keeper.py")):
        assert "another Python" in host_module.unlike(other, environment, {"Uid": "0"})
    assert "none of its modules" in host_module.unlike(replaced(module="os"), environment, {"Uid": "0"})
    assert inherited_state() == inherited_state()
    assert "cores" in inherited_state()


def replaced(**changes: str) -> ForkRequest:
    fields = {name: getattr(request(), name) for name in request().__struct_fields__}
    return ForkRequest(**{**fields, **changes})


def test_a_process_with_threads_does_not_fork() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert "threads, which would be missing in a fork" in host_module.unfit()
    finally:
        done.set()
        thread.join()


async def test_an_environment_of_its_own_is_started(
    bridges: Network, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "hypha.worker.executor")
    assert await SharedHost(shared_host()).fork(launch(bridges, "", HF_HOME="/mine")) is None
    assert "not forked, but started: HF_HOME, which is read at import" in caplog.text
    foreign = replace(launch(bridges, ""), argv=("/bin/true",), own="")
    assert await SharedHost(shared_host()).fork(foreign) is None
    ended = await run_executor(foreign, trio.Event(), 1.0, supervision=Supervision(SharedHost(shared_host())))
    assert ended.code == 0


async def test_a_host_that_is_not_there_is_one_warning(
    bridges: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = SharedHost(tmp_path / "nobody.sock")
    for _ in range(2):
        assert await nobody.fork(launch(bridges, "")) is None
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "Executors are started without their host" in warnings[0].getMessage()


def worker_config(**keys: object) -> WorkerConfig:
    identity = {f"{kind}_pem": f"/{kind}.pem" for kind in ("cert", "key", "trust")}
    return WorkerConfig.model_validate({**identity, "gateway_addresses": ["/ip4/127.0.0.1/tcp/1"], **keys})


async def test_which_host_a_worker_has(tmp_path: Path) -> None:
    foreign = ExecutorConfig(kind="train", name="toy", cmd="/bin/toy").model_dump(by_alias=True)
    for config in (worker_config(warm=False), worker_config(executors=[foreign])):
        async with open_host(config, {}) as host:
            assert host is None
    async with open_host(worker_config(warm_host=tmp_path / "host.sock"), {}) as host:
        assert isinstance(host, SharedHost)
    async with open_host(worker_config(), child_environment(run_environment())) as host:
        assert isinstance(host, OwnHost)
        await until(lambda: host.pid is not None)
        pid = host.pid
        assert pid is not None
        assert running(pid)
    assert not running(pid)


# --- ends of hosts and workers ------------------------------------------------------------------------


@asynccontextmanager
async def own_host() -> AsyncIterator[OwnHost]:
    async with trio.open_nursery() as nursery:
        host = OwnHost(child_environment(run_environment()))
        nursery.start_soon(host.run)
        await until(lambda: host.pid is not None)
        yield host
        nursery.cancel_scope.cancel()


WAITS = """
    import os, time
    open("pids", "w").write(f"{os.getpid()} {os.getppid()}\\n")
    while not os.path.exists("go"): time.sleep(0.01)
    print("went on", flush=True)
    os._exit(3)
"""


async def test_kill_9_of_the_host_is_survived(bridges: Network, caplog: pytest.LogCaptureFixture) -> None:
    made = launch(bridges, WAITS)
    ended: list[Exit] = []
    async with own_host() as host:
        first = host.pid
        assert first is not None
        async with trio.open_nursery() as nursery:

            async def run_it() -> None:
                ended.append(await run_executor(made, trio.Event(), 1.0, supervision=Supervision(host)))

            nursery.start_soon(run_it)
            pids = await family(made.work_dir)
            os.kill(first, signal.SIGKILL)
            await until(lambda: host.pid not in (first, None))
            assert all(map(running, pids)), "it goes on, and its keeper"
            (made.work_dir / "go").touch()
        assert [(one.code, one.tail) for one in ended] == [(3, "went on")]
        await until(lambda: not any(map(running, pids)))
        assert "The executor host ended with exit code -9" in caplog.text
        again = launch(bridges, "import os; print(os.getppid(), flush=True); os._exit(4)")
        forked = await host.fork(again)
        assert forked is not None
        await forked.wait()
        assert forked.code == 4
        await forked.aclose()


async def test_the_last_line_of_a_host_that_cannot_start_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "sitecustomize.py"
    said = "ImportError: libcudart.so.12: \x1b[1m missing"
    broken.write_text(f"import os\nos.write(2, {said!r}.encode())\nos._exit(1)")
    host = OwnHost({**run_environment(), "PYTHONPATH": str(tmp_path)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.run)
        await until(lambda: "The executor host ended" in caplog.text)
        nursery.cancel_scope.cancel()
    assert "again in 1 s. Its last line: ImportError: libcudart.so.12: [1m missing" in caplog.text


async def test_a_host_that_does_not_answer_is_replaced(
    bridges: Network, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with own_host() as host:
        first = host.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        monkeypatch.setattr(host, "patience_s", 0.2)
        assert await host.fork(launch(bridges, "")) is None
        assert "it has not answered for 0.2 s" in caplog.text
        await until(lambda: not running(first))


async def test_kill_9_of_the_worker_leaves_nothing(bridges: Network, tmp_path: Path) -> None:
    made = launch(bridges, GROWS)
    worker = f"""
import sys, trio
from pathlib import Path
from hypha.config.environment import child_environment
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Supervision, run_executor
from hypha.worker.processes.warm import OwnHost
async def main():
    async with trio.open_nursery() as nursery:
        host = OwnHost(child_environment())
        nursery.start_soon(host.run)
        while host.pid is None: await trio.sleep(0.01)
        Path({str(tmp_path / "host")!r}).write_text(f"{{host.pid}}\\n")
        made = Launch("job", {made.argv!r}, child_environment(), Path({str(made.work_dir)!r}),
                      own={MODULE!r}, torch_only=True)
        await run_executor(made, trio.Event(), 60.0, supervision=Supervision(host))
trio.run(main)
"""
    process = subprocess.Popen(  # noqa: ASYNC220 - outlives no test
        [sys.executable, "-c", worker], env={**run_environment(), "HF_TOKEN": TOKEN}
    )
    try:
        pids = await family(made.work_dir)
        host = int((tmp_path / "host").read_text())
        keeping = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        assert int(Path(f"/proc/{keeping}/stat").read_text().rpartition(")")[2].split()[1]) == host
        assert TOKEN not in Path(f"/proc/{host}/environ").read_text()
        assert TOKEN not in Path(f"/proc/{pids[0]}/environ").read_text()
    finally:
        process.kill()
        process.wait()
    await until(lambda: not any(map(running, [*pids, keeping, host])))


async def test_kill_9_of_the_keeper_kills_the_executor(bridges: Network) -> None:
    made = launch(bridges, WAITS)
    ended: list[Exit] = []
    async with trio.open_nursery() as nursery:

        async def run_it() -> None:
            ended.append(await run(made))

        nursery.start_soon(run_it)
        executor, keeping = await family(made.work_dir)
        os.kill(keeping, signal.SIGKILL)
    await until(lambda: not running(executor))
    assert ended[0].code == -signal.SIGKILL


async def test_kill_9_of_the_keeper_leaves_nothing_that_has_left_its_session(bridges: Network) -> None:
    """Its host adopts, and ends, what it would have."""
    made = launch(bridges, GROWS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, made)
        pids = await family(made.work_dir)
        os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)
        await until(lambda: not any(map(running, pids)))


async def test_a_shared_host_is_private(tmp_path: Path) -> None:
    assert shared_host().parent.stat().st_mode & 0o077 == 0
    await until(lambda: shared_host().exists())
    assert shared_host().stat().st_mode & 0o077 == 0
    tmp_path.chmod(0o755)
    with pytest.raises(SystemExit, match="closed to all others"):
        host_module.listen(tmp_path / "host.sock")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(tmp_path / "host.sock")

"""Limits: what is found, what is set, and that it holds for real processes."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Literal

import pytest
import trio

from hypha.config.environment import child_environment
from hypha.errors import ConfigError
from hypha.messages import Resources
from hypha.worker.limits.cgroups import (
    CONTROLLERS,
    Controller,
    find_cgroups,
    make_groups,
    remove_stale_groups,
    usable_cgroups,
    usable_v2,
)
from hypha.worker.limits.limits import Limits, Means, mechanisms, most_processes
from hypha.worker.limits.usage import CorePins, Quota
from hypha.worker.processes.keepers import Launch
from hypha.worker.processes.process import Exit, run_executor


def v2(place: Path, *controllers: str) -> dict[Controller, tuple[Literal["v2", "v1"], Path]]:
    return {controller: ("v2", place) for controller in CONTROLLERS if controller in controllers}


V1 = """\
30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


def test_v1_and_hybrid_places() -> None:
    own_v2, v1 = find_cgroups(V1, "4:memory:/jobs/a\n3:cpu,cpuacct:/\n1:name=systemd:/x\n0::/\n")
    assert own_v2 == Path("/sys/fs/cgroup/unified")
    assert v1 == {"memory": Path("/sys/fs/cgroup/memory/jobs/a"), "cpu": Path("/sys/fs/cgroup/cpu,cpuacct")}


def test_v2_place_and_a_container_that_sees_a_part_of_the_tree() -> None:
    mount = "31 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    assert find_cgroups(mount, "0::/user.slice/a b.scope\n")[0] == Path("/sys/fs/cgroup/user.slice/a b.scope")
    part = "31 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert find_cgroups(part, "0::/docker/abc/worker\n")[0] == Path("/sys/fs/cgroup/worker")
    assert find_cgroups(part, "0::/elsewhere\n")[0] == Path("/sys/fs/cgroup")


def test_v2_settings_are_written(tmp_path: Path) -> None:
    limits = Limits(Means("auto", v2(tmp_path, "memory", "cpu")), "hypha-job", Resources(cpu=1.5, memory=2))
    group = tmp_path / "hypha-job"
    assert (group / "memory.max").read_text() == "2000000000"
    assert (group / "cpu.max").read_text() == "150000 100000"
    assert options(limits) == ["--cgroup", str(group / "cgroup.procs")]
    assert limits.environment({})["OMP_NUM_THREADS"] == "1"
    assert "cgroup v2" in limits.description


def test_fallbacks() -> None:
    asked = Resources(cpu=2, memory=1)
    limits = Limits(Means("auto", {}), "x", asked)
    assert limits.rlimits == (("RLIMIT_DATA", 10**9),)
    assert limits.environment({})["OMP_NUM_THREADS"] == "2"
    nowhere = v2(Path("/nowhere"), "memory", "cpu")
    assert Limits(Means("auto", nowhere), "x", asked).rlimits == limits.rlimits
    assert options(Limits(Means("none", {}), "x", asked)) == []
    assert options(Limits(Means("auto", {}), "x", Resources())) == []
    with pytest.raises(ConfigError, match="Delegate=yes"):
        Limits(Means("cgroup", {}), "x", asked)


def options(limits: Limits) -> list[str]:
    """For the keeper of its executor."""
    return [*limits.launch(Launch("job", (), {}, Path())).keeper_options]


EATS = """
    data = []
    for _ in range(40): data.append(bytearray(b"x" * 10_000_000))
    print("ate it all")
"""


async def eat(tmp_path: Path, limits: Limits) -> Exit:
    launch = Launch(
        "job",
        (sys.executable, "-c", textwrap.dedent(EATS)),
        child_environment(),
        tmp_path,
        options(limits),
    )
    return await run_executor(launch, trio.Event(), 1.0)


async def test_rlimit_holds(tmp_path: Path) -> None:
    ended = await eat(tmp_path, Limits(Means("rlimit", {}), "x", Resources(memory=0.2)))
    assert ended.code == 1
    assert "MemoryError" in ended.tail
    assert (await eat(tmp_path, Limits(Means("none"), "x", Resources()))).tail == "ate it all"


@pytest.mark.real
async def test_cgroup_holds_and_is_removed(tmp_path: Path) -> None:
    places = usable_cgroups()
    if "memory" not in places:
        pytest.skip("no writable cgroup with the memory controller here")
    limits = Limits(Means("cgroup", places), f"hypha-test-{os.getpid()}", Resources(cpu=1, memory=0.2))
    try:
        assert all(group.is_dir() for group in limits.groups)
        ended = await eat(tmp_path, limits)
        assert ended.code == -9
        assert "want of memory (its limits: 0.2 GB memory: cgroup" in str(limits.denied())
    finally:
        await limits.remove()
    assert not any(group.exists() for group in limits.groups)
    roomy = Limits(Means("cgroup", places), f"hypha-test-{os.getpid()}", Resources(cpu=1, memory=1))
    try:
        assert (await eat(tmp_path, roomy)).code == 0
        assert roomy.denied() is None
    finally:
        await roomy.remove()


BURNS = """
    import os, time
    ends = time.monotonic() + 3.0
    while time.monotonic() < ends: sum(range(10_000))
    print(sum(os.times()[:2]))
"""


@pytest.mark.real
async def test_cores_are_shared_as_leased(tmp_path: Path) -> None:
    """Two busy executors, one with twice the lease of the other, on one core: within a tenth."""
    places = usable_cgroups()
    if "cpu" not in places:
        pytest.skip("no writable cgroup with the cpu controller here")
    leased = (0.4, 0.2)
    used = [0.0, 0.0]

    async def burn(which: int) -> None:
        limits = Limits(Means("auto", places), f"hypha-{os.getpid()}-{which}", Resources(cpu=leased[which]))
        argv = (sys.executable, "-c", textwrap.dedent(BURNS))
        launch = Launch("job", argv, child_environment(), tmp_path, options(limits))
        try:
            used[which] = float((await run_executor(launch, trio.Event(), 1.0)).tail)
        finally:
            await limits.remove()

    async with trio.open_nursery() as nursery:
        for which in (0, 1):
            nursery.start_soon(burn, which)
    assert used[0] / used[1] == pytest.approx(leased[0] / leased[1], rel=0.1), used
    assert used[0] <= 1.1 * 3.0 * leased[0]


# --- what is found, and what is said of it ------------------------------------------------------------


def test_each_controller_is_used_where_it_is(tmp_path: Path) -> None:
    """Memory by cgroup v2, processes by v1, cores by neither."""
    (tmp_path / "v2").mkdir()
    (tmp_path / "pids").mkdir()
    places = v2(tmp_path / "v2", "memory") | {"pids": ("v1", tmp_path / "pids")}
    pins = CorePins((3, 4), tmp_path / "cores")
    limits = Limits(Means("auto", places, cores=pins), "hypha-x", Resources(cpu=1, memory=1, storage=2))
    assert sorted(str(group.relative_to(tmp_path)) for group in limits.groups) == [
        "pids/hypha-x",
        "v2/hypha-x",
    ]
    assert (tmp_path / "pids" / "hypha-x" / "pids.max").read_text() == "512"
    assert not (tmp_path / "v2" / "hypha-x" / "cpu.max").exists()
    assert options(limits)[-2:] == ["--cores", "3"]
    assert limits.quota == Quota(disk_bytes=2 * 10**9)
    assert limits.description == (
        "1 GB memory: cgroup v2 (memory.max), 1 cores (3): affinity and thread counts, "
        "512 processes: cgroup v1 (pids.max), 2 GB in its directory: watched by the worker every 1 s"
    )
    said = mechanisms(Means("auto", places), cache_gb=20)
    assert said["memory"] == "cgroup v2 (memory.max)"
    assert said["cores"] == "affinity and thread counts"
    assert said["processes"] == "cgroup v1 (pids.max)"
    assert said["gpus"] == "there are none"
    with pytest.raises(ConfigError, match="Delegate=yes"):
        Limits(Means("cgroup", places), "x", Resources(cpu=1))


def test_without_cgroups_processes_are_watched() -> None:
    limits = Limits(Means("auto", {}, max_processes=7), "x", Resources(cpu=2, memory=1))
    assert limits.quota == Quota(processes=7)
    assert not Limits(Means("auto", {}, max_processes=0), "x", Resources(cpu=2)).quota
    said = mechanisms(Means("rlimit", {"memory": ("v1", Path("/nowhere"))}), cache_gb=20)
    assert said["memory"] == "RLIMIT_DATA of each process"
    assert said["processes"] == said["disk"] == "watched by the worker every 1 s"
    assert set(mechanisms(Means("none"), cache_gb=20)) == set(said)
    assert "not enforced" in mechanisms(Means("none"), cache_gb=20)["memory"]


def test_the_bound_of_processes_grows_with_the_cores() -> None:
    assert [most_processes(cpu, None) for cpu in (0, 1, 8, 32.5)] == [512, 512, 512, 2112]
    assert most_processes(64, 3) == 3


def test_a_kill_for_want_of_memory_is_told_apart(tmp_path: Path) -> None:
    limits = Limits(Means("none"), "x", Resources())
    limits.groups = (tmp_path,)
    (tmp_path / "memory.events").write_text("low 0\nhigh 3\nmax 9\noom 0\noom_kill 0\n")
    assert limits.denied() is None
    (tmp_path / "pids.events").write_text("max 4\n")
    assert "refused another process or thread 4 times" in str(limits.denied())
    (tmp_path / "memory.events").write_text("max 9\noom 1\noom_kill 1\n")
    assert "want of memory" in str(limits.denied())


def test_groups_of_workers_that_were_killed_are_removed(tmp_path: Path) -> None:
    for name, age_s in (("hypha-old", 3600), ("hypha-new", 1), ("other-old", 3600), ("hypha-worker", 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    assert remove_stale_groups({"memory": ("v1", tmp_path)}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypha-new", "hypha-worker", "other-old"]


def release(locks: dict[int, int]) -> None:
    for lock in locks.values():
        os.close(lock)


def test_cores_are_handed_out_among_all_workers_of_a_machine(tmp_path: Path) -> None:
    one, other = CorePins((0, 1, 2, 3), tmp_path / "cores"), CorePins((0, 1, 2, 3), tmp_path / "cores")
    first = one.pin(1)
    assert sorted(first) == [0]
    second = other.pin(1.5)
    assert sorted(second) == [1, 2]
    third = one.pin(2)
    assert sorted(third) == [0, 3], "one that nobody uses, then one that is shared"
    release(third)
    fourth = other.pin(1)
    assert sorted(fourth) == [3]
    assert not other.pin(4), "all of them: no restriction"
    for locks in (first, second, fourth):
        release(locks)
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    assert not CorePins((0, 1), tmp_path / "open").pin(1), "anybody could hold its locks"


async def test_affinity_holds(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    limits = Limits(Means("none"), "x", Resources())
    limits.cores = (core,)
    script = "import os; print(sorted(os.sched_getaffinity(0)))"
    launch = Launch("job", (sys.executable, "-c", script), child_environment(), tmp_path, options(limits))
    assert (await run_executor(launch, trio.Event(), 1.0)).tail == f"[{core}]"


def delegated(root: Path, controllers: str, given: str = "") -> Path:
    """A cgroup v2 as systemd delegates it, with this process alone in it."""
    root.mkdir()
    files = {"cgroup.controllers": controllers, "cgroup.subtree_control": given, "cgroup.procs": os.getpid()}
    for name, text in files.items():
        (root / name).write_text(f"{text}\n")
    return root


def test_a_delegated_v2_gives_what_it_has_to_executors(tmp_path: Path) -> None:
    place = delegated(tmp_path / "whole", "cpuset cpu io memory pids")
    assert usable_v2(place) == {"cpu", "memory", "pids"}
    # this process moved into a leaf, as a group with processes of its own gives its children nothing
    assert (place / "hypha-worker" / "cgroup.procs").read_text() == str(os.getpid())
    assert (place / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    places = v2(place, *usable_v2(place))
    groups = make_groups(places, "hypha-x", Resources(memory=2.0, cpu=0.001), 64)
    assert groups == (place / "hypha-x",)
    written = {path.name: path.read_text() for path in groups[0].iterdir()}
    assert written == {
        "memory.max": "2000000000",
        "memory.oom.group": "1",
        "memory.swap.max": "0",
        "cpu.max": "1000 100000",
        "cpu.weight": "1",
        "pids.max": "64",
    }


def test_a_v2_may_have_less_or_nothing(tmp_path: Path) -> None:
    assert usable_v2(delegated(tmp_path / "user", "memory pids", "memory pids")) == {"memory", "pids"}
    assert not (tmp_path / "user" / "hypha-worker").exists(), "all was given already"
    assert usable_v2(delegated(tmp_path / "empty", "")) == frozenset()
    assert usable_v2(tmp_path / "nowhere") == frozenset()

"""Limits: what is found, what is set, and that it holds for real processes."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest
import trio

from hypha.config.inherited import child_environment
from hypha.errors import ConfigError
from hypha.messages import Resources
from hypha.worker.devices import GpuPins, list_gpus
from hypha.worker.keepers import Launch
from hypha.worker.limits import CgroupPlaces, Limits, apply_limits, find_cgroups, usable_cgroups
from hypha.worker.process import Exit, run_executor

V1 = """\
30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""


def test_v1_and_hybrid_places() -> None:
    v2, v1 = find_cgroups(V1, "4:memory:/jobs/a\n3:cpu,cpuacct:/\n1:name=systemd:/x\n0::/\n")
    assert v2 == Path("/sys/fs/cgroup/unified")
    assert v1 == {"memory": Path("/sys/fs/cgroup/memory/jobs/a"), "cpu": Path("/sys/fs/cgroup/cpu,cpuacct")}


def test_v2_place_and_a_container_that_sees_a_part_of_the_tree() -> None:
    mount = "31 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    assert find_cgroups(mount, "0::/user.slice/a b.scope\n")[0] == Path("/sys/fs/cgroup/user.slice/a b.scope")
    part = "31 23 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert find_cgroups(part, "0::/docker/abc/worker\n")[0] == Path("/sys/fs/cgroup/worker")
    assert find_cgroups(part, "0::/elsewhere\n")[0] == Path("/sys/fs/cgroup")


def test_v2_settings_are_written(tmp_path: Path) -> None:
    limits = apply_limits("auto", CgroupPlaces(v2=tmp_path), "hypha-job", Resources(cpu=1.5, memory=2))
    group = tmp_path / "hypha-job"
    assert (group / "memory.max").read_text() == "2000000000"
    assert (group / "cpu.max").read_text() == "150000 100000"
    assert limits.launch_options() == ["--cgroup", str(group / "cgroup.procs")]
    assert limits.environment["OMP_NUM_THREADS"] == "1"
    assert "cgroup v2" in limits.description


def test_fallbacks() -> None:
    asked = Resources(cpu=2, memory=1)
    limits = apply_limits("auto", CgroupPlaces(), "x", asked)
    assert limits.rlimits == (("RLIMIT_DATA", 10**9),)
    assert limits.environment["OMP_NUM_THREADS"] == "2"
    nowhere = CgroupPlaces(v2=Path("/nowhere"))
    assert apply_limits("auto", nowhere, "x", asked).rlimits == limits.rlimits
    assert apply_limits("none", CgroupPlaces(), "x", asked).launch_options() == []
    assert apply_limits("auto", CgroupPlaces(), "x", Resources()).launch_options() == []
    with pytest.raises(ConfigError, match="Delegate=yes"):
        apply_limits("cgroup", CgroupPlaces(), "x", asked)


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
        limits.launch_options(),
    )
    return await run_executor(launch, trio.Event(), 1.0)


async def test_rlimit_holds(tmp_path: Path) -> None:
    ended = await eat(tmp_path, apply_limits("rlimit", CgroupPlaces(), "x", Resources(memory=0.2)))
    assert ended.code == 1
    assert "MemoryError" in ended.tail
    assert (await eat(tmp_path, Limits("none"))).tail == "ate it all"


@pytest.mark.real
async def test_cgroup_holds_and_is_removed(tmp_path: Path) -> None:
    places = usable_cgroups()
    if places.v2 is None and "memory" not in places.v1:
        pytest.skip("no writable cgroup with the memory controller here")
    limits = apply_limits("cgroup", places, f"hypha-test-{os.getpid()}", Resources(cpu=1, memory=0.2))
    try:
        assert all(group.is_dir() for group in limits.groups)
        ended = await eat(tmp_path, limits)
        assert ended.code == -9
        assert "want of memory (its limits: cgroup" in limits.verdict()
    finally:
        await limits.remove()
    assert not any(group.exists() for group in limits.groups)
    roomy = apply_limits("cgroup", places, f"hypha-test-{os.getpid()}", Resources(cpu=1, memory=1))
    try:
        assert (await eat(tmp_path, roomy)).code == 0
        assert roomy.verdict() == ""
    finally:
        await roomy.remove()


def test_gpus_are_pinned_and_given_back(tmp_path: Path) -> None:
    assert list_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-abc"}) == ["2", "GPU-abc"]
    assert list_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert list_gpus({}, tmp_path / "nothing") == []
    (tmp_path / "0000:01:00.0").mkdir()
    assert list_gpus({}, tmp_path) == ["0"]
    pins = GpuPins(["0", "1"])
    first, second = pins.pin(10.0), pins.pin(5.0)
    assert {first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]} == {"0", "1"}
    pins.release(second)
    assert pins.pin(1.0) == second
    assert pins.pin(0.0) == {"CUDA_VISIBLE_DEVICES": ""}
    assert GpuPins([]).pin(1.0) == {}

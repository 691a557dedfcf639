"""What a machine has, and what of it a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from hypha.messages import Resources
from hypha.telemetry.resources import GpuReading
from hypha.worker.limits.detecting import DetectedMachine, detect, lowered
from hypha.worker.limits.gpus import Gpu, find_gpus


def tree(root: Path, files: dict[str, str]) -> Path:
    """The kernel's files of another machine."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_all_there_is(tmp_path: Path) -> None:
    found = detect(tmp_path / "not" / "there", {}, tree(tmp_path, {}))
    assert found.cpu == len(os.sched_getaffinity(0))
    assert found.memory == pytest.approx(psutil.virtual_memory().total / 1e9)
    assert found.storage > 0
    assert found.gpus == ()
    assert found.describe()["gpu"] == "none"


def test_memory_is_the_kernels_own_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = dict.fromkeys(
        ("MemFree", "Buffers", "Cached", "Active", "Inactive", "MemAvailable", "Shmem", "Slab"), 5
    )
    lines = [f"{name}:  {amount} kB\n" for name, amount in {"MemTotal": 1000000, **memory}.items()]
    root = tree(tmp_path, {"proc/meminfo": "".join(lines)})
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"))
    found = detect(tmp_path, {}, root)
    assert (found.memory, found.memory_by) == (1.024, "all of this machine")


@pytest.mark.parametrize(
    ("own", "files", "mounts", "version"),
    [
        (
            "0::/system.slice/hypha.service\n",
            {
                "system.slice/hypha.service/cpu.max": "max 100000",
                "system.slice/cpu.max": "50000 100000",
                "system.slice/hypha.service/memory.max": "2000000000",
                "memory.max": "max",
            },
            "31 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            "v2",
        ),
        (
            "4:cpu,cpuacct:/a/b\n3:memory:/a/b\n",
            {
                "cpu/a/cpu.cfs_quota_us": "50000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "cpu/a/b/cpu.cfs_quota_us": "-1",
                "memory/a/b/memory.limit_in_bytes": "2000000000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            "32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "33 30 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
            "v1",
        ),
    ],
    ids=["v2", "v1"],
)
def test_a_containers_limits_count(
    tmp_path: Path, own: str, files: dict[str, str], mounts: str, version: str
) -> None:
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    root = tree(tmp_path, {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **groups})
    found = detect(tmp_path, {}, root)
    assert found.cpu == 0.5
    assert found.memory == 2.0
    assert found.cpu_by == f"a quota of this process's cgroup ({version})"
    assert found.memory_by == f"the limit of this process's cgroup ({version})"


def test_pinned_to_one_core_it_has_one(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        found = detect(tmp_path, {}, tree(tmp_path, {}))
    finally:
        os.sched_setaffinity(0, before)
    assert found.cpu == 1
    assert len(before) == 1 or "pinned to 1 of" in found.cpu_by


def test_what_the_slice_cache_holds_makes_room(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "slice").write_bytes(b"x" * 2_000_000)
    found = detect(tmp_path, {}, tree(tmp_path, {}))
    assert "held by the slice cache" in found.storage_by


# --- GPUs ---------------------------------------------------------------------------------------------

NVIDIA = {
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA A10\nGPU UUID: \t GPU-aaaa-1\n",
    "proc/driver/nvidia/gpus/0000:41:00.0/information": "Model: \t\t NVIDIA T4\nGPU UUID: \t GPU-bbbb-2\n",
}
ROCM = {
    "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 64\nsimd_count 0\n",
    "sys/class/kfd/kfd/topology/nodes/0/mem_banks/0/properties": "heap_type 0\nsize_in_bytes 500000000000\n",
    "sys/class/kfd/kfd/topology/nodes/10/properties": "simd_count 440\nunique_id 255\n",
    "sys/class/kfd/kfd/topology/nodes/10/name": "aldebaran\n",
    "sys/class/kfd/kfd/topology/nodes/10/mem_banks/0/properties": "heap_type 1\nsize_in_bytes 68702699520\n",
    "sys/class/kfd/kfd/topology/nodes/2/properties": "simd_count 240\ngfx_target_version 90400\n",
}


def nothing() -> tuple[GpuReading, ...]:
    """As NVIDIA's library where there is none."""
    return ()


def test_the_library_of_nvidia_tells_most() -> None:
    reading = GpuReading("0", "GPU-1", 0.0, 0, 80_000_000_000, "NVIDIA H100")
    (gpu,) = find_gpus({}, read=lambda: [reading])
    assert gpu == Gpu("nvidia", "0", "NVIDIA H100", 80_000_000_000, "nvidia-ml-py", "GPU-1")
    assert str(gpu) == "NVIDIA H100 (80.0 GB)"


def test_without_it_the_driver_tells_what_there_is_but_not_the_memory(tmp_path: Path) -> None:
    root = tree(tmp_path, NVIDIA)
    found = find_gpus({}, root, read=nothing)
    assert [(one.name, one.model, one.memory_bytes) for one in found] == [
        ("0", "NVIDIA A10", 0),
        ("1", "NVIDIA T4", 0),
    ]
    machine = DetectedMachine(1, "", 1, "", 1, "", found)
    assert "NVIDIA T4 (memory unknown): /proc/driver/nvidia" in machine.describe()["gpu"]
    # what is not known is believed
    assert lowered(Resources(gpu=99), machine) == (Resources(gpu=99), ())


def test_rocm_is_read_from_its_topology(tmp_path: Path) -> None:
    root = tree(tmp_path, ROCM)
    found = find_gpus({}, root, read=nothing)
    assert found == (
        Gpu("amd", "0", "AMD GPU (gfx 90400)", 0, "ROCm's kernel driver", ""),
        Gpu("amd", "1", "aldebaran", 68702699520, "ROCm's kernel driver", "GPU-00000000000000ff"),
    )
    (one,) = find_gpus({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000ff"}, root, read=nothing)
    assert one.model == "aldebaran"


@pytest.mark.parametrize(
    ("visible", "models"),
    [
        ("1", ["NVIDIA T4"]),
        ("1,0", ["NVIDIA T4", "NVIDIA A10"]),
        (" GPU-bbbb ", ["NVIDIA T4"]),
        ("", []),
        ("0,-1,1", ["NVIDIA A10"]),
        ("7,1", []),
        ("MIG-GPU-5", ["MIG-GPU-5"]),
    ],
)
def test_what_the_environment_hides_is_not_there(tmp_path: Path, visible: str, models: list[str]) -> None:
    root = tree(tmp_path, NVIDIA)
    found = find_gpus({"CUDA_VISIBLE_DEVICES": visible}, root, read=nothing)
    assert [one.model for one in found] == models
    assert [one.name for one in found] == [part.strip() for part in visible.split(",")][: len(found)]


# --- what may be offered ------------------------------------------------------------------------------

MACHINE = DetectedMachine(
    4, "all", 25.37, "all", 67.8, "free", (Gpu("nvidia", "0", "T4", 16 * 10**9, "here"),)
)


def test_a_configuration_may_ask_for_less() -> None:
    asked = Resources(cpu=2, memory=25.3, gpu=0, storage=0.5)
    assert lowered(asked, MACHINE) == (asked, ())


def test_what_is_more_than_there_is_is_lowered_and_told() -> None:
    offered, claims = lowered(Resources(cpu=64, memory=100, gpu=17, storage=67.9), MACHINE)
    assert offered == Resources(cpu=4, memory=25.3, gpu=16, storage=67.8)
    assert [claim.resource for claim in claims] == ["cpu", "memory", "gpu"], "rounding is no claim"
    assert str(claims[0]) == (
        "resources.cpu = 64 is more than this machine has (4 cores: all); 4 is offered instead"
    )
    assert "T4 (16.0 GB): here" in str(claims[2])

"""What a machine has, and what of it a process may use."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from hypha.worker.detecting import detect


def test_without_limits_it_is_all_there_is(tmp_path: Path) -> None:
    found = detect(tmp_path / "not" / "there", tmp_path / "none", tmp_path / "none")
    assert found.cpu == len(os.sched_getaffinity(0))
    assert found.memory == pytest.approx(psutil.virtual_memory().total / 1e9)
    assert found.storage > 0


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (
            "0::/system.slice/hypha.service\n",
            {
                "system.slice/hypha.service/cpu.max": "max 100000",
                "system.slice/cpu.max": "50000 100000",
                "system.slice/hypha.service/memory.max": "2000000000",
                "memory.max": "max",
            },
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
        ),
    ],
    ids=["v2", "v1"],
)
def test_a_containers_limits_count(tmp_path: Path, own: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    found = detect(tmp_path, tmp_path / "groups", tmp_path / "own")
    assert found.cpu == 0.5
    assert found.memory == 2.0


def test_pinned_to_one_core_it_has_one(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert detect(tmp_path, tmp_path, tmp_path / "none").cpu == 1
    finally:
        os.sched_setaffinity(0, before)

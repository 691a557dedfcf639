"""A worker that cannot work says so when it starts, not when the first job comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypha.config.models import WorkerConfig
from hypha.config.offers import ResourcesConfig
from hypha.errors import ConfigError
from hypha.worker.limits.cgroups import usable_cgroups
from hypha.worker.limits.detecting import DetectedMachine
from hypha.worker.limits.limits import suffice
from hypha.worker.node import offered, run_worker


def config(**keys: Any) -> WorkerConfig:
    identity = {name: Path("none.pem") for name in ("cert_pem", "key_pem", "trust_pem")}
    return WorkerConfig(**identity, gateway_addresses=["/ip4/127.0.0.1/tcp/1"], **keys)


async def test_a_work_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ConfigError) as caught:
        await run_worker(config(work_dir=tmp_path / "file" / "work"))
    (problem,) = caught.value.problems
    assert problem.key == "work_dir"
    assert f"{tmp_path}/file/work cannot be written" in problem.message


def test_no_more_is_offered_than_there_is(caplog: pytest.LogCaptureFixture) -> None:
    machine = DetectedMachine(2, "all", 25.3, "all", 67.8, "free")
    asked = ResourcesConfig(cpu=64, memory=8, gpu=0, storage=20)
    lowered, words = offered(config(resources=asked), machine)
    assert lowered.resources == ResourcesConfig(cpu=2, memory=8, gpu=0, storage=20)
    assert words["resource cpu"] == "2 offered (2 cores: all)"
    assert "resources.cpu = 64 is more than this machine has" in caplog.text
    believed, words = offered(config(resources=asked, detect_resources=False), machine)
    assert believed.resources == asked
    assert words["resource cpu"] == "64 offered (2 cores: all)"


@pytest.mark.skipif(suffice(usable_cgroups()), reason="there are cgroups here")
async def test_cgroups_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limits: no writable cgroup"):
        await run_worker(config(work_dir=tmp_path, limits={"enforce": "cgroup"}))

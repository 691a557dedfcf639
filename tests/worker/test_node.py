"""A worker that cannot work says so when it starts, not when the first job comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypha.config.models import WorkerConfig
from hypha.errors import ConfigError
from hypha.worker import run_worker
from hypha.worker.cgroups import usable_cgroups


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


@pytest.mark.skipif(bool(usable_cgroups()), reason="there are cgroups here")
async def test_cgroups_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="limits: no writable cgroup"):
        await run_worker(config(work_dir=tmp_path, limits="cgroup"))

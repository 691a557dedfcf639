"""A job where there is no IPv4."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.system import System, digits_dataset, digits_job

from hypha.cli.local.network import free_port

pytestmark = [pytest.mark.real, pytest.mark.timeout(200)]


async def test_a_job_over_ipv6_alone_hands_over_its_checkpoints_and_its_model(
    system: System, tmp_path: Path
) -> None:
    address = f"/ip6/::1/tcp/{free_port()}"
    planned = {"listen_addresses": [address], "external_addresses": [address]}
    system.gateways.append(f"{address}/p2p/{system.peer_id('gateway', 'gateway')}")
    listen = {"listen_addresses": ["/ip6/::1/tcp/0"]}
    await system.start("gateway", "gateway", system.write("gateway", "gateway", **planned))
    await system.data("data", digits_dataset(tmp_path), **listen)
    for number in range(2):
        await system.worker(f"worker-{number}", **listen)
    job = digits_job(None, 2, 4, checkpoint={"every_rounds": 2})
    scheduler = await system.scheduler(job, **listen)
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "state" / "job" / "checkpoints" / "round-4").is_dir()

"""A node whose certificate is revoked is shut out by running nodes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trio
from tests.support.system import System

pytestmark = [pytest.mark.real, pytest.mark.timeout(200)]


async def run(system: System, module: str, *arguments: str) -> int:
    done = await trio.run_process(
        [sys.executable, "-m", f"hypha.cli.{module}", *arguments],
        check=False,
        capture_stdout=True,
        capture_stderr=True,
        env=system.group.environment,
    )
    return done.returncode


async def test_a_revoked_worker_is_refused_without_a_restart(system: System, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    assert system.ca.cert is not None
    ca = ("--ca-cert", str(system.ca.cert), "--ca-key", str(system.ca.key), "--crl", str(crl))
    assert await run(system, "certutil", "revoke", *ca) == 0
    planned = system.plan_gateway() | {"crls_pem": str(crl)}
    gateway = await system.gateway(planned=planned)
    good, bad = await system.worker("good"), await system.worker("bad")
    address = planned["listen_addresses"][0]

    async def probe(name: str) -> int:
        config = str(tmp_path / f"{name}.toml")
        return await run(system, "worker", "probe", address, "--config", config, "--timeout", "20000")

    for child in (good, bad):
        await system.logged(child, "gateway")
    assert await probe("bad") == 0
    refused = len(gateway.log.read_text().splitlines())
    assert await run(system, "certutil", "revoke", *ca, str(tmp_path / "pki" / "bad-cert.pem")) == 0
    await system.logged(gateway, "The identity files were read again")
    await system.logged(bad, "Lost gateway")
    assert await probe("bad") != 0
    assert await probe("good") == 0
    assert "revoked" in "".join(gateway.log.read_text().splitlines()[refused:])
    assert gateway.process.poll() is None
    assert bad.process.poll() is None
    assert "Lost gateway" not in good.log.read_text()

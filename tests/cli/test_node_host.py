"""Nodes that a host has forked: like those that are started, however they end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import trio
from tests.support.host import run_environment, shared_node_host

from hypha.cli.local.children import Child, Children, children
from hypha.cli.local.network import Network, open_network
from hypha.cli.local.node_host import ForkedNode, NodeHost

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="node hosts are for Linux")


@asynccontextmanager
async def network_of(root: Path, host: NodeHost) -> AsyncIterator[Network]:
    async with open_network(Network, root, run_environment(), None, host) as network:
        yield network


async def gateway_of(network: Network) -> Child:
    """A gateway that listens."""
    gateway = await network.gateway()
    await network.logged_value(gateway, "addresses")
    return gateway


async def test_a_forked_node_is_like_one_that_was_started(tmp_path: Path) -> None:
    async with network_of(tmp_path, shared_node_host()) as network:
        forked = await gateway_of(network)
        network.prefixes["gateway-2"] = ("env",)
        network.plan_gateway("gateway-2")
        started = await network.gateway("gateway-2")
        await network.logged_value(started, "addresses")
        assert isinstance(forked.process, ForkedNode)
        assert not isinstance(started.process, ForkedNode)
        one, other = psutil.Process(forked.process.pid), psutil.Process(started.process.pid)
        assert one.cwd() == other.cwd() == os.getcwd()
        assert one.cmdline()[:4] == other.cmdline()[:4] == [sys.executable, "-m", "hypha.cli.gateway", "run"]
        assert os.getsid(one.pid) == os.getpgid(one.pid) == one.pid
        masks = [_signals(process.pid) for process in (one, other)]
        assert masks[0] == masks[1]
        targets = [
            sorted(os.readlink(f"/proc/{process.pid}/fd/{number}").split(":")[0] for number in (0, 1, 2))
            for process in (one, other)
        ]
        assert targets == [sorted(["/dev/null", str(node.log), str(node.log)]) for node in (forked, started)]
        assert _files(one.pid) == _files(other.pid)


def _signals(pid: int) -> dict[str, str]:
    """Which are blocked, ignored and handled."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if line.startswith(("SigBlk", "SigIgn", "SigCgt")))


def _files(pid: int) -> list[str]:
    """Kinds of the open files beyond the standard ones."""
    names = sorted(os.listdir(f"/proc/{pid}/fd"), key=int)[3:]
    return sorted(os.readlink(f"/proc/{pid}/fd/{name}").split(":")[0] for name in names)


async def test_its_end_is_known(tmp_path: Path) -> None:
    async with network_of(tmp_path, shared_node_host()) as network:
        gateway = await gateway_of(network)
        assert gateway.process.poll() is None
        gateway.process.terminate()
        assert await gateway.process.wait() == 128 + signal.SIGTERM
        again = await network.start("gateway+1", "gateway", tmp_path / "gateway.toml")
        await network.logged_value(again, "addresses")
        again.process.kill()
        assert await again.process.wait() == -signal.SIGKILL
        assert again.process.poll() == again.process.returncode == -signal.SIGKILL
        # no process of this number may be met by what comes too late
        again.process.kill()
        broken = await network.start("gateway+2", "gateway", tmp_path / "missing.toml")
        assert await broken.process.wait() == 2
        assert "missing.toml" in broken.log.read_text()


async def test_nodes_outlive_their_host(tmp_path: Path) -> None:
    host = NodeHost(tmp_path / "host.log", run_environment())
    async with network_of(tmp_path, host) as network:
        gateway = await gateway_of(network)
        assert isinstance(gateway.process, ForkedNode)
        killed = psutil.Process(gateway.process.pid).parent()
        assert killed is not None
        killed.kill()
        host.close()
        assert gateway.process.poll() is None
        # without the host it is started
        again = await network.start("gateway+1", "gateway", tmp_path / "missing.toml")
        assert not isinstance(again.process, ForkedNode)
        assert await again.process.wait() == 2
        with trio.fail_after(30):
            gateway.process.terminate()
            assert await gateway.process.wait() == -signal.SIGKILL


async def test_it_has_the_environment_that_was_asked_for(tmp_path: Path) -> None:
    async with network_of(tmp_path, shared_node_host()) as network:
        network.group.environment["HYPHA_LOG_LEVEL"] = "nonsense"
        gateway = await network.gateway()
        assert isinstance(gateway.process, ForkedNode)
        assert await gateway.process.wait() == 2
        assert "HYPHA_LOG_LEVEL" in gateway.log.read_text()


async def test_what_was_read_early_is_not_forked(tmp_path: Path) -> None:
    environment = {**run_environment(), "PYTHONWARNINGS": "default"}
    async with children(tmp_path, environment, shared_node_host()) as group:
        child = await group.start("gateway", "hypha.cli.gateway", "--version")
        assert not isinstance(child.process, ForkedNode)
        assert await child.process.wait() == 0
        other = await group.start("other", "hypha.cli.certutil", "--help", environment=run_environment())
        assert not isinstance(other.process, ForkedNode)
        assert await other.process.wait() == 0


async def test_a_group_without_a_host_has_its_own(tmp_path: Path) -> None:
    async with children(tmp_path, run_environment()) as group:
        child = await group.start("gateway", "hypha.cli.gateway", "--version")
        assert isinstance(child.process, ForkedNode)
        assert await child.process.wait() == 0
        assert child.log.read_text().startswith("hypha-gateway ")


async def test_many_are_asked_for_at_once(tmp_path: Path) -> None:
    async def start(group: Children, number: int) -> None:
        found.append(await group.start(f"gateway-{number}", "hypha.cli.gateway", "--version"))

    found: list[Child] = []
    async with children(tmp_path, run_environment(), shared_node_host()) as group:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(start, group, number)
        assert len({child.process.pid for child in found}) == 20
        for child in found:
            assert await child.process.wait() == 0

"""A throw-away Hypha network for tests: a PKI in a directory, and nodes with test-friendly timings.

Use it through the fixture ``network`` (``from tests.support.network import network`` in a conftest)::

    async def test_something(network):
        async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:
            await worker.wait_connected()
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from hypha.net import Libp2pNode as Node
from hypha.net import NodeOptions, Timings, open_node
from hypha.pki.authority import CaFiles, make_node, make_org, make_root
from hypha.pki.identity import Identity, IdentityFiles, load_identity

#: Short, but long enough for a busy machine with two cores.
TEST_TIMINGS = Timings(
    silence_s=3.0,
    dial_s=3.0,
    relay_after_s=0.5,
    reconnect_min_s=0.05,
    reconnect_max_s=0.5,
    identity_poll_s=0.2,
    lookup_s=3.0,
)

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


class Pki:
    """Root -> organisation -> nodes, in ``directory``."""

    def __init__(self, directory: Path, organization: str = "Test") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        root = make_root(f"{organization} Root", directory)
        self.root = CaFiles(root.cert, root.key)
        made = make_org(organization, self.root, directory)
        self.org = CaFiles(made.cert, made.key, made.trust)
        self._numbers = itertools.count()

    def files(self, name: str = "", roles: Sequence[str] = (), days: int = 30) -> IdentityFiles:
        """Files of a new node."""
        stem = f"{name or 'node'}-{next(self._numbers)}"
        made = make_node(stem, self.org, self.directory, roles=roles, days=days)
        assert made.trust is not None
        return IdentityFiles(made.cert, made.key, made.trust)

    def identity(self, name: str = "", roles: Sequence[str] = ()) -> Identity:
        """A new node's identity."""
        return load_identity(self.files(name, roles))


def address_of(node: Node) -> str:
    """Where a test node can be dialled, with its PeerID."""
    return f"{node.listen_addresses()[0]}/p2p/{node.peer_id}"


class Network:
    """Opens gateways and leaves that trust each other."""

    def __init__(self, directory: Path) -> None:
        self.pki = Pki(directory)
        self.timings = TEST_TIMINGS

    def options(self, component: str, **changes: Any) -> NodeOptions:
        """Options of a test node; ``changes`` override."""
        roles = changes.pop("roles", ())
        identity = changes.pop("identity", None) or self.pki.identity(component, roles)
        options = NodeOptions(identity, f"hypha-{component}", listen=LOOPBACK, timings=self.timings)
        return replace(options, **changes)

    def settings(self, component: str, gateways: Sequence[Node]) -> dict[str, Any]:
        """What a configuration says of a new node of ``component`` and its way into the network."""
        files = self.pki.files(component, (component,))
        return {
            "cert_pem": files.cert,
            "key_pem": files.key,
            "trust_pem": files.trust,
            "listen_addresses": list(LOOPBACK),
            "gateway_addresses": [address_of(one) for one in gateways],
            "exclude_cidr": [],
        }

    @asynccontextmanager
    async def gateway(self, others: Sequence[Node | str] = (), **changes: Any) -> AsyncIterator[Node]:
        """A gateway, linked with ``others``."""
        gateways = tuple(one if isinstance(one, str) else address_of(one) for one in others)
        changes.setdefault("roles", ("gateway",))
        options = self.options("gateway", hop=True, reserve=False, gateways=gateways, **changes)
        async with open_node(options) as node:
            yield node

    @asynccontextmanager
    async def leaf(
        self, component: str, gateways: Sequence[Node | str] = (), connected: bool = True, **changes: Any
    ) -> AsyncIterator[Node]:
        """A worker, scheduler or data node; waits until it is connected unless ``connected=False``."""
        addresses = tuple(one if isinstance(one, str) else address_of(one) for one in gateways)
        async with open_node(self.options(component, gateways=addresses, **changes)) as node:
            if connected:
                with trio.fail_after(60):
                    await node.wait_connected()
            yield node


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until ``condition()`` is true; the limit is for what hangs, and no claim."""
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.01)


@pytest.fixture
def network(tmp_path: Path) -> Network:
    """A throw-away network."""
    return Network(tmp_path / "pki")

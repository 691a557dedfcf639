"""Nodes in processes of their own, so that the two ends of a measurement do not share an interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio
from tests.support.network import LOOPBACK, Pki, address_of

from hypha.config.tuning import LimitsConfig
from hypha.net import Libp2pNode as Node
from hypha.net import NodeOptions, open_node
from hypha.pki.identity import IdentityFiles, load_identity

__all__ = ["LOOPBACK", "NodeFiles", "Pki", "child", "gateway", "options"]

START_S = 60


@dataclass(frozen=True)
class NodeFiles:
    """What a child needs to open a node. ``relayed``: it neither dials nor announces direct addresses."""

    identity: IdentityFiles
    gateways: tuple[str, ...] = ()
    relayed: bool = False
    directory: Path = Path(".")
    #: of further nodes in the same process
    more: tuple[IdentityFiles, ...] = ()
    limits: LimitsConfig = field(default_factory=LimitsConfig)


def options(files: NodeFiles, component: str) -> NodeOptions:
    """Options of a node on the loopback interface."""
    return NodeOptions(
        load_identity(files.identity),
        component,
        listen=LOOPBACK,
        gateways=files.gateways,
        hop=component == "hypha-gateway",
        reserve=component != "hypha-gateway",
        exclude_cidr=("127.0.0.0/8",) if files.relayed else (),
        limits=files.limits,
    )


Main = Callable[[NodeFiles, Callable[[Any], None]], Awaitable[None]]


def _run(main: Main, files: NodeFiles, ready: Connection) -> None:
    trio.run(main, files, ready.send)


@contextmanager
def child(main: Main, files: NodeFiles) -> Iterator[Any]:
    """Run ``main(files, ready)`` in a process; gives what it called ``ready`` with. Killed at the end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(main, files, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise TimeoutError(f"{main.__name__} did not start within {START_S} s")
        try:
            said = ours.recv()
        except EOFError as exc:
            raise RuntimeError(f"{main.__name__} ended while starting; see its traceback above") from exc
        yield said
    finally:
        process.kill()
        process.join()
        ours.close()


async def gateway(files: NodeFiles, ready: Callable[[Any], None]) -> None:
    """A gateway; ready with its address."""
    node: Node
    async with open_node(options(files, "hypha-gateway")) as node:
        ready(address_of(node))
        await trio.sleep_forever()

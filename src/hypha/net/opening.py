"""How a node comes to life and ends, :func:`open_node`, and what metrics show of it meanwhile.

A node owns its tasks, threads and sockets; none outlives the block in which it is open, however that is
left. While the block is being cancelled the node still lives, so that there may be a goodbye.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager

import trio

from hypha.access import ROLES
from hypha.errors import ConfigError, Problem, leaves
from hypha.net.libp2p.host import quiet_library
from hypha.net.node import Libp2pNode
from hypha.net.options import NodeOptions
from hypha.net.peers.addresses import parse
from hypha.runtime import wall_time
from hypha.telemetry import instruments
from hypha.telemetry.metrics import Reading
from hypha.tracing import untraced

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_node(options: NodeOptions) -> AsyncIterator[Libp2pNode]:
    """A running node, listening; its gateways are being connected in the background.

    Raises ConfigError when it cannot listen or an address in ``options`` is none.
    """
    for key, texts in (
        ("listen_addresses", options.listen),
        ("external_addresses", options.external),
        ("gateway_addresses", options.gateways),
    ):
        for text in texts:
            try:
                parse(text)
            except ValueError as exc:
                raise ConfigError([Problem(key=key, message=str(exc))]) from exc
    _say_without_role(options)
    quiet_library()
    failures: list[BaseException] = []
    with _unwrapped(failures):
        async with trio.open_nursery() as nursery:
            with untraced():  # what a node does by itself is no part of the operation that opened it
                node = await nursery.start(_live, options, failures)
            nursery.start_soon(node.note_leaving)
            try:
                yield node
            except BaseException as exc:
                failures.append(exc)
                raise
            finally:
                node.ended.set()
                nursery.cancel_scope.cancel()


def _say_without_role(options: NodeOptions) -> None:
    if options.identity.roles or options.guest:
        return
    role = options.component.removeprefix("hypha-")
    logger.warning(
        "The certificate of this node carries no role: nodes with require_roles (the default) refuse it. "
        "Give it one with `hypha-certutil renew %s --role %s --ca-cert ... --ca-key ...`; its PeerID stays.",
        options.identity.files.cert,
        role if role in ROLES else "...",
    )


async def _live(
    options: NodeOptions, failures: list[BaseException], task_status: trio.TaskStatus[Libp2pNode]
) -> None:
    """Open a node and keep it alive, until it is told to end: a caller that is cancelled may still say
    goodbye over it, in a shielded scope of its own.
    """
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            tasks = await nursery.start(_hold_open)
            node = Libp2pNode(options, tasks)
            async with AsyncExitStack() as stack:
                try:
                    await node.listen(stack)
                    stack.enter_context(shown(node))
                    node.start()
                    task_status.started(node)
                    await trio.lowlevel.checkpoint()  # cancelled while starting: nobody will end us
                    scope.shield = True
                    await node.ended.wait()
                except ConfigError as exc:
                    failures.append(exc)
                    raise
                finally:
                    # first whatever might still dial: a connection made while the library closes would leak
                    tasks.cancel_scope.cancel()
                    await node.close()


async def _hold_open(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery that can be cancelled without cancelling whom it was opened for."""
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


@contextmanager
def _unwrapped(failures: list[BaseException]) -> Iterator[None]:
    """Let the one of ``failures`` that happened out as it was, not wrapped once for each nursery here."""
    try:
        yield
    except BaseExceptionGroup as group:
        for failure in failures:
            parts = leaves(failure) if isinstance(failure, BaseExceptionGroup) else [failure]
            if leaves(group) == parts:
                raise failure from failure.__cause__
        raise


@contextmanager
def shown(node: Libp2pNode) -> Iterator[None]:
    with ExitStack() as stack:
        for gauge, source in (
            (instruments.CONNECTIONS, lambda: _connections(node)),
            (instruments.ROUND_TRIP, lambda: _round_trips(node)),
            (instruments.GOSSIP_MESH, lambda: node.mesh_size),
            (instruments.TRANSFERS, lambda: _transfers(node)),
            (instruments.CERTIFICATE_EXPIRES, lambda: _expirations(node)),
            (instruments.UPTIME, lambda: node.uptime_s),
        ):
            stack.enter_context(gauge.watch(source))
        if (hop := node.hop) is not None:
            stack.enter_context(instruments.CIRCUITS.watch(lambda: hop.circuits))
            stack.enter_context(instruments.RESERVATIONS.watch(lambda: hop.reservations))
        if (server := node.dht_server) is not None:
            stack.enter_context(instruments.DHT_ROUTING_TABLE.watch(lambda: server.known))
        yield


def _connections(node: Libp2pNode) -> list[Reading]:
    # kinds of which there are none are shown, too: a series that vanishes alarms nobody
    count = Counter((one.direction, one.kind) for one in node.connections())
    return [
        ({"direction": direction, "way": way}, count[direction, way])
        for direction in ("inbound", "outbound")
        for way in ("direct", "relayed")
    ]


def _round_trips(node: Libp2pNode) -> list[Reading]:
    best: dict[str, float] = {}
    for one in node.connections():
        if one.round_trip_s is not None:
            best[one.peer] = min(one.round_trip_s, best.get(one.peer, one.round_trip_s))
    return [({"peer": peer}, seconds) for peer, seconds in best.items()]


def _transfers(node: Libp2pNode) -> list[Reading]:
    return [({"direction": name}, number) for name, number in node.transfers.under_way.items()]


def _expirations(node: Libp2pNode) -> list[Reading]:
    now = wall_time()
    return [({"file": file}, end.timestamp() - now) for file, end in node.identity.expirations().items()]

"""How a node comes to life and ends: :func:`open_node`.

A node owns its tasks, threads and sockets; none outlives the block in which it is open, however that is
left. While the block is being cancelled the node still lives, so that there may be a goodbye.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import trio

from hypha.access import ROLES
from hypha.errors import ConfigError, Problem
from hypha.net.gauges import shown
from hypha.net.libp2p.host import quiet_library
from hypha.net.node import Libp2pNode
from hypha.net.options import NodeOptions
from hypha.net.peers.addresses import parse
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
            if _leaves(group) == _leaves(failure):
                raise failure from failure.__cause__
        raise


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for one in exc.exceptions for leaf in _leaves(one)]
    return [exc]

"""The last checkpoint of a job that is told to stop, so that it goes on from the very round it was in.

The tasks of the job are gone by then, the node is not: the parameter server is asked directly, and what
it says still arrives as actions of the round machine. Of these only books are kept: nothing is steered any
more. Whoever waits is not patient: when it takes longer, the checkpoint before that has to do.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from hypha.errors import NetworkError
from hypha.messages import JobStamp, PeerRef, SaveCheckpoint, Steer
from hypha.node import Node
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.rounds.events import Action, Durable
from hypha.scheduler.rounds.machine import RoundMachine

logger = logging.getLogger(__name__)

#: above all that was said before, and below the farewell
_SEQ = (1 << 62) - 1
_PAUSE_S = 0.1


async def save_last(
    node: Node,
    machine: RoundMachine,
    ledger: Ledger,
    todo: trio.MemoryReceiveChannel[Action],
    keep_ledger: Callable[[Durable], Awaitable[None]],
    timeout_s: float,
) -> None:
    """Have the open round of ``machine`` saved as it began, unless it is, for at most ``timeout_s``.

    Takes what is left in ``todo``; ``keep_ledger`` carries out what of it the ledger is to have.
    """
    fields = {"job_id": machine.start.job_id}
    while (action := _next(todo)) is not None:
        if isinstance(action, Durable):
            await keep_ledger(action)
    newest = await ledger.run(Ledger.newest_start)
    if machine.server is None or not machine.server_ready or machine.phase in ("done", "failed"):
        _say_where(machine, newest, fields)
        return
    asked_for = machine.round
    if newest < asked_for:
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                stamp = JobStamp(job_id=machine.start.job_id, generation=machine.start.generation)
                nursery.start_soon(_ask, node, machine.server, stamp, asked_for)
                while newest < machine.round:
                    action = await todo.receive()
                    if isinstance(action, Durable):
                        await keep_ledger(action)
                        newest = await ledger.run(Ledger.newest_start)
                nursery.cancel_scope.cancel()
    _say_where(machine, newest, fields)


def _next(todo: trio.MemoryReceiveChannel[Action]) -> Action | None:
    try:
        return todo.receive_nowait()
    except trio.WouldBlock:
        return None


def _say_where(machine: RoundMachine, newest: int, fields: dict[str, str]) -> None:
    if newest < machine.round:
        logger.warning(
            "Round %d could not be saved in time; the job will go on from round %d",
            machine.round,
            newest,
            extra=fields,
        )
    else:
        logger.info("The job will go on from round %d", newest, extra=fields)


async def _ask(node: Node, server: PeerRef, stamp: JobStamp, round_: int) -> None:
    """Until it is heard."""
    steer = Steer(stamp=stamp, kind="aggregate", seq=_SEQ, directive=SaveCheckpoint(round=round_))
    while True:
        try:
            await node.request(server.peer, steer)
            return
        except NetworkError as exc:
            logger.debug(
                "The parameter server was not asked to save: %s", exc, extra={"worker_peer_id": server.peer}
            )
        await trio.sleep(_PAUSE_S)

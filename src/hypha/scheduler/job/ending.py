"""How a job ends: published, or stopped so that it goes on from the very round it was in; and a job that an
earlier scheduler has brought to its end, for which nothing is left to do.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from hypha.config.job import JobConfig
from hypha.errors import JobFailed, NetworkError, OutputError
from hypha.messages import JobStamp, LedgerFile, PeerRef, SaveCheckpoint, Steer
from hypha.node import Node
from hypha.runtime import in_thread
from hypha.scheduler.descriptions import described
from hypha.scheduler.durable.export import Published, absolute_place, local_directory
from hypha.scheduler.durable.ledger import Ledger, export_ledger, open_ledger
from hypha.scheduler.durable.starts import differences
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.job.states import JobContext, JobResult
from hypha.scheduler.rounds.events import Action, Durable
from hypha.scheduler.rounds.machine import RoundMachine

logger = logging.getLogger(__name__)


async def publish(
    context: JobContext, ledger: Ledger, machine: RoundMachine, files: tuple[str, ...]
) -> JobResult:
    """Publish the ``files`` that the parameter server exported; the job is done then. Raises
    :class:`hypha.errors.HyphaError`, after which the job can be started again.
    """
    config, start, state = context.config, machine.start, context.state
    export = state.export_of(start.generation)
    missing = [name for name in files if not (export / name).is_file()]
    if missing or not files:
        what = ", ".join(missing) or "any file"
        raise JobFailed(f"the parameter server exported the model without {what}")
    about = Published(
        job=config.name,
        job_id=start.job_id,
        rounds=context.rules.rounds,
        samples=context.progressed.samples,
        theta=machine.theta,
    )
    # before the model: what fails here must not leave a model that is published once more
    file = await ledger.run(Ledger.to_file)
    path = state.path / "ledger.json"
    try:
        await in_thread(export_ledger, file, path)
    except OSError as exc:
        raise OutputError(
            f"{path} cannot be written: {exc}; free space there and start the job again"
        ) from exc
    output = await in_thread(context.output.publish, export, about)
    await ledger.run(Ledger.done, absolute_place(config.output), output)
    logger.info("The trained model is in %s", output, extra={"job_id": start.job_id})
    return _result(config.name, file, output, path, trio.current_time() - context.began)


def _result(name: str, file: LedgerFile, output: str, path: Path, wall_s: float) -> JobResult:
    """Of a job that has applied a round, by its ledger."""
    counted = [entry for entry in file.rounds if not entry.discarded]
    return JobResult(
        name=name,
        job_id=file.job.job_id,
        rounds=len(counted),
        samples=sum(entry.samples for entry in counted),
        loss=counted[-1].loss,
        theta=counted[-1].theta,
        output=output,
        ledger=path,
        wall_s=wall_s,
        workers=len({part.worker for entry in counted for part in entry.contributors}),
    )


async def finished_job(state_dir: Path, config: JobConfig) -> JobResult | None:
    """What came of the job of ``config``, if an earlier scheduler has brought it to its end and it is to have
    no more rounds than it had; changes nothing. ``None`` when there is something to do, as there is where the
    model was published at another place, or is not there any more.
    """
    if not (state_dir / config.name / "job.db").exists():
        return None
    with StateDirectory(state_dir, config.name) as state:
        ledger = await open_ledger(state.ledger)
        try:
            standing = await ledger.run(Ledger.standing)
            if standing is None or standing.state != "done":
                return None
            file = await ledger.run(Ledger.to_file)
            published = await ledger.run(Ledger.published)
        finally:
            ledger.close()
        began = standing.aggregate.optimizer
        train, aggregate = described(config, PeerRef(peer=""), standing.job_id, began)
        if differences(msgspec.structs.replace(standing, train=train, aggregate=aggregate), standing):
            return None
        counted = [entry for entry in file.rounds if not entry.discarded]
        if not counted or len(counted) < config.rounds.update_rounds:
            return None
        place = absolute_place(config.output)
        if published is None or published[0] != place or not await in_thread(_is_there, place):
            return None
        wall_s = sum(entry.duration_s for entry in counted)
        return _result(config.name, file, published[1], state.path / "ledger.json", wall_s)


def _is_there(place: str) -> bool:
    """Of a directory: is a published model in it? What lies in a bucket or on the hub is believed."""
    directory = local_directory(place)
    return directory is None or (directory / "hypha.json").is_file()


#: above the numbers of all directives before it, and below that of the last one
_SEQ = (1 << 62) - 1
_PAUSE_S = 0.1


async def save_last(
    node: Node,
    machine: RoundMachine,
    ledger: Ledger,
    todo: trio.MemoryReceiveChannel[Action | trio.Event],
    carry_out: Callable[[Action | trio.Event], Awaitable[None]],
    timeout_s: float,
) -> None:
    """Have the open round of ``machine`` saved as it began, unless it is, for at most ``timeout_s``.

    Takes what is left in ``todo``, and carries out what of it the ledger is to have.
    """
    while True:
        try:
            action = todo.receive_nowait()
        except trio.WouldBlock:
            break
        if isinstance(action, Durable | trio.Event):
            await carry_out(action)
    newest, asked_for = await _newest_start(ledger), machine.round
    server = machine.server if machine.server_ready and machine.phase not in ("done", "failed") else None
    if server is not None and newest < asked_for:
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_request_save, node, server, machine.start.stamp, asked_for)
                while newest < machine.round:
                    action = await todo.receive()
                    if isinstance(action, Durable | trio.Event):
                        await carry_out(action)
                        newest = await _newest_start(ledger)
                nursery.cancel_scope.cancel()
    fields = {"job_id": machine.start.job_id}
    if newest < machine.round:
        text = "Round %d could not be saved in time; the job will go on from round %d"
        logger.warning(text, machine.round, newest, extra=fields)
    else:
        logger.info("The job will go on from round %d", newest, extra=fields)


async def _newest_start(ledger: Ledger) -> int:
    return (await ledger.run(Ledger.starts))[0].round


async def _request_save(node: Node, server: PeerRef, stamp: JobStamp, round_: int) -> None:
    """Send it until it is delivered."""
    steer = Steer(stamp=stamp, kind="aggregate", seq=_SEQ, directive=SaveCheckpoint(round=round_))
    while True:
        try:
            await node.request(server.peer, steer)
            return
        except NetworkError as exc:
            fields = {"worker_peer_id": server.peer}
            logger.debug("The request to save a checkpoint was not delivered: %s", exc, extra=fields)
        await trio.sleep(_PAUSE_S)

"""How a job ends: its model is published; and a job that an earlier scheduler has brought to its end, for
which nothing is left to do.
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import msgspec
import trio

from hypha.config.job import JobConfig
from hypha.errors import JobFailed, OutputError
from hypha.messages import LedgerFile, PeerRef
from hypha.runtime import in_thread
from hypha.scheduler.descriptions import described
from hypha.scheduler.durable.export import Published, absolute_place, local_directory
from hypha.scheduler.durable.ledger import Ledger, export_ledger, open_ledger
from hypha.scheduler.durable.starts import differences
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.job.states import JobContext, JobResult
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
        with closing(await open_ledger(state.ledger)) as ledger:
            standing = await ledger.run(Ledger.standing)
            if standing is None or standing.state != "done":
                return None
            file = await ledger.run(Ledger.to_file)
            published = await ledger.run(Ledger.published)
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

"""The last step of a job: its ledger is written beside its state, its model published."""

from __future__ import annotations

import logging

import trio

from hypha.errors import JobFailed, OutputError
from hypha.runtime import in_thread
from hypha.scheduler.durable.export import Published, absolute_place
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.durable.ledger_files import export_ledger
from hypha.scheduler.job.states import JobContext, JobResult
from hypha.scheduler.rounds.machine import RoundMachine

logger = logging.getLogger(__name__)


async def publish(
    context: JobContext, ledger: Ledger, machine: RoundMachine, files: tuple[str, ...]
) -> JobResult:
    """Publish the ``files`` that the parameter server exported; the job is done then. Raises
    :class:`hypha.errors.HyphaError`, after which the job can be started again.
    """
    start, state = machine.start, context.state
    export = state.export_of(start.generation)
    missing = [name for name in files if not (export / name).is_file()]
    if missing or not files:
        what = ", ".join(missing) or "any file"
        raise JobFailed(f"the parameter server exported the model without {what}")
    about = Published(
        job=context.config.name,
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
        raise OutputError(f"{path} cannot be written: {exc}; make room and start the job again") from exc
    output = await in_thread(context.output.publish, export, about)
    await ledger.run(Ledger.done, absolute_place(context.config.output), output)
    logger.info("The trained model is in %s", output, extra={"job_id": start.job_id})
    counted = [entry for entry in file.rounds if not entry.discarded]
    return JobResult(
        name=context.config.name,
        job_id=start.job_id,
        rounds=context.rules.rounds,
        samples=context.progressed.samples,
        loss=context.progressed.loss,
        theta=machine.theta,
        output=output,
        ledger=path,
        wall_s=trio.current_time() - context.began,
        workers=len({part.worker for entry in counted for part in entry.contributors}),
    )

"""A job that an earlier scheduler has brought to its end: started again, there is nothing to do."""

from __future__ import annotations

from pathlib import Path

from hypha.config.models import JobConfig
from hypha.messages import PeerRef
from hypha.runtime import in_thread
from hypha.scheduler.durable.export import absolute_place, local_directory
from hypha.scheduler.durable.ledger import Ledger, open_ledger
from hypha.scheduler.durable.starts import described, different
from hypha.scheduler.durable.state_directory import StateDirectory
from hypha.scheduler.job.states import JobResult


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
        if different((train, aggregate), (standing.train, standing.aggregate)):
            return None
        counted = [entry for entry in file.rounds if not entry.discarded]
        if not counted or len(counted) < config.rounds.update_rounds:
            return None
        place = absolute_place(config.output)
        if published is None or published[0] != place or not await in_thread(_is_there, place):
            return None
        return JobResult(
            name=config.name,
            job_id=standing.job_id,
            rounds=len(counted),
            samples=sum(entry.samples for entry in counted),
            loss=counted[-1].loss,
            theta=counted[-1].theta,
            output=published[1],
            ledger=state.path / "ledger.json",
            wall_s=sum(entry.duration_s for entry in counted),
            workers=len({part.worker for entry in counted for part in entry.contributors}),
        )


def _is_there(place: str) -> bool:
    """Of a directory: is a published model in it? What lies in a bucket or on the hub is believed."""
    directory = local_directory(place)
    return directory is None or (directory / "hypha.json").is_file()

"""What a scheduler gives to the workers of its job, and to nobody else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tests.support.virtual_network import VirtualNetwork, virtual_time

from hypha.errors import Refused
from hypha.messages import FileList, ListFiles, PullFile
from hypha.scheduler.descriptions import MODEL
from hypha.scheduler.durable.state_directory import CheckpointStore, StateDirectory
from hypha.scheduler.handlers import FileHandlers, ServedDirectory


@virtual_time
async def test_the_model_is_for_this_job_on_workers_that_it_has_leased(
    network: VirtualNetwork, tmp_path: Path
) -> None:
    """A worker may be leased by several schedulers: what it asks for belongs to one job of one of them."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    state = StateDirectory(tmp_path / "state", "digits")
    members: set[str] = set()
    async with (
        network.gateway() as gateway,
        network.leaf("scheduler", [gateway], roles=("scheduler",)) as scheduler,
        network.leaf("worker", [gateway], roles=("worker",)) as worker,
    ):
        served = {MODEL: ServedDirectory(MODEL, tmp_path / "model")}
        store = CheckpointStore(state, "job-1", 1)
        handlers = FileHandlers(scheduler, served, store, members.__contains__, lambda peer, stamp: False)
        handlers.open()

        async def refusal(job_id: str | None) -> str:
            file = PullFile(kind=MODEL, name="config.json", job_id=job_id)
            codes = []
            for ask in (
                partial(worker.request, scheduler.ref(), ListFiles(kind=MODEL, job_id=job_id)),
                partial(worker.transfers.pull, scheduler.ref(), file, tmp_path / "pulled", None, 100),
            ):
                try:
                    await ask()
                except Refused as exc:
                    codes.append(exc.code)
                else:
                    codes.append("")
            assert codes[0] == codes[1]
            return codes[0]

        assert await refusal("job-1") == "uninvited"
        members.add(worker.peer_id)
        assert await refusal("job-2") == "uninvited"
        # workers of earlier versions do not say for which job
        assert await refusal(None) == ""
        assert await refusal("job-1") == ""
        answer = await worker.request(scheduler.ref(), ListFiles(kind=MODEL, job_id="job-1"))
        assert isinstance(answer, FileList)
        assert [file.name for file in answer.files] == ["config.json"]
        with pytest.raises(Refused, match="no resource"):
            await worker.request(scheduler.ref(), ListFiles(kind="other", job_id="job-1"))

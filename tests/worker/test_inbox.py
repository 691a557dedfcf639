"""Who may send what to an executor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from hypha.config.models import ExecutorConfig
from hypha.errors import Refused
from hypha.messages import (
    AggregateJob,
    ExecutorDescriptor,
    JobStamp,
    Members,
    ModelSpec,
    PeerRef,
    TransferMeta,
)
from hypha.node import Arrived, Gate
from hypha.rules.leases import Lease
from hypha.worker.jobs.traffic import MAX_WAITING, ExecutionContext, ExecutorTraffic


class Accepting:
    """The files that a node accepts."""

    gate: Gate
    arrived: Arrived

    def accept(self, kind: str, job_id: str | None, gate: Gate, arrived: Arrived) -> Callable[[], None]:
        self.gate, self.arrived = gate, arrived
        return lambda: None


class Setting:
    """An executor of the job's generation 3, which ``senders`` may send to."""

    def __init__(self, tmp_path: Path) -> None:
        transfers = Accepting()
        context = SimpleNamespace(
            node=SimpleNamespace(transfers=transfers, request=print),
            config=SimpleNamespace(work_dir=tmp_path, hang_s=60.0),
            allowance=SimpleNamespace(max_file_bytes=100),
            emit_spans=None,
        )
        lease = cast(Lease, SimpleNamespace(lease_id="lease"))
        job = AggregateJob(
            job_id="job",
            generation=3,
            executor=ExecutorDescriptor(kind="aggregate", name="some"),
            me="me",
            scheduler=PeerRef(peer="scheduler"),
            model=ModelSpec(task="torch", entrypoint="a:b"),
        )
        executor = ExecutorConfig(kind="aggregate", name="some")
        self.traffic = ExecutorTraffic(
            cast(ExecutionContext, context), lease, job, executor, lambda reason: True
        )
        self.directory = self.traffic.directory
        with self.traffic.accepting():
            self.inbox = transfers
        self.steerings = 0

    def let_send(self, *senders: str) -> None:
        self.steerings += 1
        members = Members(round=0, peers=tuple(PeerRef(peer=peer) for peer in senders))
        self.traffic.steer(self.steerings, members)

    async def send(self, caller: str, meta: TransferMeta) -> Path:
        path = await self.inbox.gate(caller, meta)
        path.write_bytes(b"x" * meta.size)
        await self.inbox.arrived(caller, meta, path)
        return self.directory.part("incoming") / path.name

    async def code(self, caller: str, meta: TransferMeta) -> str | None:
        try:
            await self.inbox.gate(caller, meta)
        except Refused as exc:
            return exc.code
        return None


def theta(
    round_: int = 0,
    generation: int = 3,
    job_id: str = "job",
    size: int = 1,
    hash_: str = "",
    attempt: int = 0,
) -> TransferMeta:
    stamp = JobStamp(job_id=job_id, generation=generation, round=round_, attempt=attempt)
    return TransferMeta(kind="theta", name="theta", size=size, xxh3=hash_ or f"{round_:032}", stamp=stamp)


@pytest.fixture
async def setting(tmp_path: Path) -> Setting:
    made = Setting(tmp_path)
    assert await made.code("ps", theta()) == "busy", "nobody knows yet who takes part"
    made.let_send("ps")
    return made


async def test_refusals(setting: Setting) -> None:
    assert await setting.code("ps", theta()) is None
    assert await setting.code("stranger", theta()) == "uninvited"
    assert await setting.code("ps", theta(generation=2)) == "stale"
    assert await setting.code("ps", theta(generation=4)) == "busy"
    assert await setting.code("ps", theta(job_id="other")) == "malformed"
    assert await setting.code("ps", TransferMeta(kind="theta", name="x", size=1, xxh3="0")) == "malformed"
    assert await setting.code("ps", theta(size=101)) == "too-large"
    assert await setting.code("ps", theta(hash_="../../x")) == "malformed"
    unchecked = msgspec.structs.replace(theta(), xxh3="", blake3="0" * 64)
    assert await setting.code("ps", unchecked) == "malformed"
    setting.let_send()
    assert await setting.code("ps", theta()) == "uninvited"


async def test_one_that_waits_is_not_taken_twice_one_worked_off_is(setting: Setting) -> None:
    path = await setting.send("ps", theta(1))
    assert await setting.code("ps", theta(1)) == "duplicate"
    path.unlink()
    assert await setting.send("ps", theta(1)) == path


async def test_older_rounds_of_the_same_sender_are_stale(setting: Setting) -> None:
    await setting.send("ps", theta(5))
    assert await setting.code("ps", theta(4)) == "stale"
    setting.let_send("other")  # a new parameter server goes on from a checkpoint
    assert await setting.code("other", theta(2)) is None


async def test_the_same_theta_for_another_attempt_is_no_duplicate(setting: Setting) -> None:
    first = await setting.send("ps", theta(5, attempt=0))
    second = await setting.send("ps", theta(5, attempt=1))
    assert first != second
    assert await setting.code("ps", theta(5, attempt=1)) == "duplicate"
    assert await setting.code("ps", theta(5, attempt=0)) == "stale"
    assert await setting.code("ps", theta(6, attempt=0)) is None


async def test_names_never_clash(setting: Setting) -> None:
    setting.let_send("a", "b")
    paths = {
        await setting.send("a", theta(1)),
        await setting.send("b", theta(1)),
        await setting.send("a", theta(1, hash_="f" * 64)),
        await setting.send("a", theta(2)),
    }
    assert len(paths) == 4
    assert all(path.parent == setting.directory.part("incoming") for path in paths)


async def test_sender_cannot_fill_the_disk(setting: Setting) -> None:
    paths = [await setting.send("ps", theta(number)) for number in range(MAX_WAITING)]
    assert await setting.code("ps", theta(MAX_WAITING)) == "busy"
    paths[0].unlink()
    assert await setting.code("ps", theta(MAX_WAITING)) is None

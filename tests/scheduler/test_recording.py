"""What metric sinks are given: once a round, from the round machine's decisions and the job's snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.sinks.endpoints import Bridge, bridge
from tests.support.polling import until

from hypha.config.models import SchedulerConfig
from hypha.journal import Journal
from hypha.messages import Contribution, LedgerRound, OuterOptimizer, PeerRef, UpdateStatistics
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.goodput.report import GoodputReport
from hypha.scheduler.rounds.events import GenerationBegan, Record, TimePassed
from hypha.scheduler.rounds.policy import CarriedOver, Rules, Start
from hypha.scheduler.status.recording import recording, settings_of
from hypha.scheduler.status.snapshot import JobSnapshot


@pytest.fixture
def server() -> Iterator[Bridge]:
    with bridge() as opened:
        yield opened


def config_of(tmp_path: Path, *sinks: dict[str, str]) -> SchedulerConfig:
    return SchedulerConfig.model_validate(
        {
            "cert_pem": "c.pem",
            "key_pem": "k.pem",
            "trust_pem": "t.pem",
            "gateway_addresses": ["/ip4/192.0.2.1/tcp/1"],
            "state_dir": str(tmp_path),
            "scheduler": {
                "job": {
                    "name": "digits",
                    "model": {"type": "torch", "entrypoint": "package.module:Model"},
                    "dataset": {"dataset": "digits"},
                    "rounds": {"inner_steps": 4},
                    "output": "out",
                },
                "sinks": list(sinks),
            },
        }
    )


def part(worker: str, round_: int, loss: float) -> Contribution:
    return Contribution(
        round=round_,
        worker=worker,
        incarnation="i",
        samples=64,
        batches=4,
        batch_size=16,
        steps=0,
        ranges=(),
        loss=loss,
    )


def applied(round_: int, *parts: Contribution, generation: int = 0, loss: float = 2.0) -> Record:
    entry = LedgerRound(
        round=round_,
        theta="t",
        contributors=parts,
        generation=generation,
        samples=64 * len(parts),
        loss=loss,
        update_norm=0.5,
        duration_s=4.0,
        updates=tuple(
            UpdateStatistics(worker=part.worker, norm=2.0, cosine=None, size_bytes=1) for part in parts
        ),
    )
    return Record(entry, None, 0)


def began(config: SchedulerConfig, generation: int, round_: int) -> GenerationBegan:
    return GenerationBegan(
        Rules.from_config(config.scheduler.job),
        Start("digits-0123", generation, round_),
        SliceTracker([60, 60]).to_state(),
        PeerRef(peer="scheduler"),
        CarriedOver(),
    )


def goodput(samples_per_s: float) -> GoodputReport:
    return GoodputReport(
        wall_s=8.0,
        places=2,
        goodput_s=8.0,
        pending_s=0.0,
        badput_s={},
        samples=64,
        samples_per_s=samples_per_s,
        calm_samples_per_s=None,
        runtime=None,
        scheduling=1.0,
    )


def of(server: Bridge, worker: str, name: str) -> list[tuple[int, float]]:
    return [
        (body["round"], body["value"])
        for body in server.got
        if (body["worker_id"], body["metric_name"]) == (worker, name)
    ]


def test_runs_are_compared_by_the_outer_optimizer_that_was_chosen(tmp_path: Path) -> None:
    job = config_of(tmp_path).scheduler.job
    start = Start("digits-0123", optimizer=OuterOptimizer(learning_rate=1.0, momentum=0.6))
    told = settings_of(job, start)["outer_optimizer"]
    assert (told["learning_rate"], told["momentum"], told["weighting"]) == (1.0, 0.6, "samples")


async def test_each_round_once_with_all_that_is_known(tmp_path: Path, server: Bridge) -> None:
    config = config_of(tmp_path, {"type": "http", "url": server.url})
    journal = Journal()
    async with recording(config, journal) as feeding:
        assert feeding is not None
        journal.note("rounds", 0.0, began(config, 0, 0), (), {})
        journal.note("rounds", 1.0, TimePassed(), (applied(0, part("a", 0, 1.0)),), {})
        feeding.see(JobSnapshot("digits", job_id="digits-0123", samples=64, goodput=goodput(8.0), epoch=1))
        journal.note(
            "rounds", 2.0, TimePassed(), (applied(1, part("a", 1, 0.5), part("b", 1, float("nan"))),), {}
        )
        feeding.see(JobSnapshot("digits", job_id="digits-0123", samples=192, goodput=goodput(16.0), epoch=1))
        # nothing new
        feeding.see(JobSnapshot("digits", job_id="digits-0123", samples=192, goodput=goodput(15.7), epoch=1))
        # a life that goes back to round 1
        journal.note("rounds", 3.0, began(config, 1, 1), (), {})
        journal.note("rounds", 4.0, TimePassed(), (applied(1, part("a", 1, 0.25), generation=1),), {})
        feeding.see(JobSnapshot("digits", job_id="digits-0123", samples=128, goodput=goodput(8.0), epoch=1))
        await until(lambda: len(of(server, "a", "loss")) == 3, 30)
    assert of(server, "a", "loss") == [(1, 1.0), (2, 0.5), (2, 0.25)]
    assert of(server, "b", "samples") == [(2, 64.0)]
    assert (of(server, "b", "update_norm"), of(server, "b", "update_cosine")) == ([(2, 2.0)], [])
    # JSON has no such number
    assert of(server, "b", "loss") == []
    assert of(server, "digits", "loss") == [(1, 2.0), (2, 2.0), (2, 2.0)]
    assert of(server, "digits", "samples_per_second") == [(1, 16.0), (2, 32.0), (2, 16.0)]
    assert of(server, "digits", "goodput") == [(1, 8.0), (2, 16.0), (2, 8.0)]
    assert of(server, "digits", "learning_rate")[0] == (1, 1e-3)
    assert journal.listeners == []


async def test_a_resumed_job_has_the_samples_from_before_and_without_an_account_no_goodput(
    tmp_path: Path, server: Bridge
) -> None:
    config = config_of(tmp_path, {"type": "http", "url": server.url})
    journal = Journal()
    async with recording(config, journal) as feeding:
        assert feeding is not None
        journal.note("rounds", 0.0, began(config, 1, 100), (), {})
        feeding.see(JobSnapshot("digits", job_id="digits-0123", samples=6400))
        journal.note("rounds", 1.0, TimePassed(), (applied(100, part("a", 100, 1.0), generation=1),), {})
        feeding.see(JobSnapshot("digits", job_id="digits-0123", samples=6464))
        await until(lambda: bool(of(server, "a", "samples")), 30)
    assert of(server, "digits", "goodput") == []
    assert of(server, "digits", "samples") == [(101, 6464.0)]


async def test_without_sinks_nobody_listens(tmp_path: Path) -> None:
    journal = Journal()
    async with recording(config_of(tmp_path), journal) as feeding:
        assert feeding is None
        assert journal.listeners == []

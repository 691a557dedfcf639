"""What viewers of a job's page receive, and what never reaches them."""

from __future__ import annotations

import logging

import pytest
import trio
from tests.scheduler.test_history import watched

from hypha.cli.job_page import KEPT_LINES, JobPage, LastWarnings
from hypha.cli.redaction import MARK, redacted, redacted_config, secrets_in
from hypha.config.models import DatasetRef, JobConfig, ModelConfig
from hypha.scheduler.round_record import Now, Past
from hypha.scheduler.snapshot import JobSnapshot

SECRET = "hf_abcdefghijklmnop"


def config(**changes: object) -> JobConfig:
    model = ModelConfig(type="causal-lm", repository="org/model", token=SECRET)
    given = {"model": model, "dataset": DatasetRef(dataset="d"), "output": "out", **changes}
    return JobConfig(**given)  # type: ignore[arg-type]


def logger() -> tuple[logging.Logger, LastWarnings]:
    log, handler = logging.Logger("hypha.scheduler"), LastWarnings(secrets_in(config()))
    log.addHandler(handler)
    return log, handler


def test_the_last_warnings_are_kept_without_secrets() -> None:
    log, handler = logger()
    log.info("nothing to worry about")
    log.warning("it was refused with %s", SECRET, extra={"worker_peer_id": "12D3KooW"})
    (line,) = handler.lines
    assert (line.level, line.message, line.peer) == ("warn", f"it was refused with {MARK}", "12D3KooW")
    for number in range(100):
        log.error("%d %s", number, "x" * 5000)
    assert len(handler.lines) == KEPT_LINES
    assert handler.lines[-1].number == 101
    assert len(handler.lines[-1].message) <= 500


def test_a_log_line_that_cannot_be_written_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log, handler = logger()
    log.warning("%d", "no number")
    assert handler.lines == ()
    assert "no number" in capsys.readouterr().err


def test_secrets_are_known_by_their_names() -> None:
    found = secrets_in(config(output="s3://key:pass%2Fword@bucket/x", output_token="hf_another_one"))
    assert {SECRET, "hf_another_one", "pass/word"} <= found
    text = f"at s3://key:pass%2Fword@bucket with {SECRET}\n-----BEGIN PRIVATE KEY-----\nMIIE\n"
    clean = redacted(text, found)
    for secret in (SECRET, "pass%2Fword", "MIIE"):
        assert secret not in clean
    shown = redacted_config(config().model_dump())
    assert isinstance(shown, dict)
    assert (shown["model"]["token"], shown["model"]["repository"]) == (MARK, "org/model")
    assert shown["output_token"] is None


async def test_late_viewers_see_what_was_before(autojump_clock: trio.testing.MockClock) -> None:
    world, history = watched()
    page = JobPage(JobSnapshot("digits"), history, tuple)
    early = page.begin()
    told = dict(early())
    assert isinstance(told["past"], Past)
    assert told["past"].rounds == ()
    world.run(60, until=lambda: world.machine.round == 2)
    page.observe(JobSnapshot("digits", round=2, samples=7))
    ((name, now),) = early()
    assert (name, isinstance(now, Now)) == ("now", True)
    assert isinstance(now, Now)
    assert (now.job.round, now.job.samples) == (2, 7)
    assert [record.round for record in now.rounds] == [0, 1]
    assert now.open is not None
    assert now.open.round == 2
    # to the one that has seen them they are not told again
    ((_, again),) = early()
    assert isinstance(again, Now)
    assert again.rounds == ()
    late = dict(page.begin()())
    assert isinstance(late["past"], Past)
    assert [record.round for record in late["past"].rounds] == [0, 1]
    # an earlier scheduler's rounds were read meanwhile: everybody is told everything once more
    history.restore([])
    assert [name for name, _ in early()] == ["past", "now"]

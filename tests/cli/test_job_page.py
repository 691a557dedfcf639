"""What viewers of a job's page receive, and what never reaches them."""

from __future__ import annotations

import logging

import msgspec
import pytest
import trio
from tests.scheduler.test_history import watched

from hypha.cli.job.redaction import MARK, redacted, redacted_config, secrets_in
from hypha.cli.job.scheduling import KEPT_LINES, JobPage, LastWarnings
from hypha.config.job import DatasetRef, JobConfig, ModelConfig
from hypha.scheduler.status.history import History
from hypha.scheduler.status.round_record import Now, Past
from hypha.scheduler.status.snapshot import JobSnapshot

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


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("cloned https://ghp_token@host/m", "ghp_token"),
        ("cloned https://ghp_token:@host/m", "ghp_token"),
        ("sftp://user:p@ss@host/m", "p@ss"),
        ("https://h/c/b?sv=2024&sig=s1g%3D&se=9", "s1g"),
        ("https://h/b?X-Amz-Credential=AKIA1&X-Amz-Signature=feed", "AKIA1"),
        ("https://h/b?X-Amz-Credential=AKIA1&X-Amz-Signature=feed", "feed"),
        ('{"url": "https://h/b?a=1\\u0026Signature=feed"}', "feed"),
        ("https://h/b?Policy=eyJ&Key-Pair-Id=K2", "eyJ"),
        ("http://127.0.0.1:9102/?token=abc", "abc"),
        ("https://h/b?password=abc and https://h/#api_key=def", "abc"),
        ("https://h/b?password=abc and https://h/#api_key=def", "def"),
    ],
)
def test_addresses_are_shown_without_what_signs_in(text: str, secret: str) -> None:
    clean = redacted(text, ())
    assert secret not in clean
    assert MARK in clean


def test_addresses_without_secrets_stay_as_they_are() -> None:
    text = "https://host/m?sv=2024&page=2#top and /dns4/host/tcp/1, user@host, a@b://c"
    assert redacted(text, ()) == text


def test_secrets_of_the_environment_are_known_in_connection_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        "DefaultEndpointsProtocol=https;AccountKey=QWNjb3VudA==;EndpointSuffix=core.windows.net",
    )
    monkeypatch.setenv("STORAGE_SAS", "?sv=2024&sig=c2lnbmF0dXJl%3D")
    monkeypatch.setenv("SASL_MECHANISM", "SCRAM-SHA-512")
    found = secrets_in(config(output="https://ghp_word@host/m"))
    assert {"QWNjb3VudA==", "c2lnbmF0dXJl%3D", "c2lnbmF0dXJl=", "ghp_word"} <= found
    assert not {"https", "core.windows.net", "SCRAM-SHA-512"} & found


async def test_nothing_of_the_job_is_told_with_a_secret() -> None:
    secrets = secrets_in(config())
    page = JobPage(
        JobSnapshot("digits", output="sftp://user:pw@host/m", message=f"refused {SECRET}: a\udc80"),
        History(),
        tuple,
        secrets,
    )
    page.begin()
    shown = page.status()
    assert (shown.output, shown.message) == (f"sftp://{MARK}@host/m", f"refused {MARK}: a?")
    page.job = JobSnapshot("digits", state="failed", message="https://token@host/m")
    _, (_, now) = page.begin()()
    assert isinstance(now, Now)
    assert now.job.message == f"https://{MARK}@host/m"
    msgspec.json.encode(now)


async def test_late_viewers_see_what_was_before(autojump_clock: trio.testing.MockClock) -> None:
    world, history = watched()
    page = JobPage(JobSnapshot("digits"), history, tuple)
    early = page.begin()
    told = dict(early())
    assert isinstance(told["past"], Past)
    assert told["past"].rounds == ()
    world.run(60, until=lambda: world.machine.round == 2)
    page.job = JobSnapshot("digits", round=2, samples=7)
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

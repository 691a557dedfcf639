"""The owner's allow-lists, and the ways around them that are none."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.worker.test_process import train_job

from hypha.config.models import AllowConfig
from hypha.errors import Refused
from hypha.messages import (
    AggregateJob,
    CheckpointPolicy,
    ExecutorDescriptor,
    HuggingFace,
    Local,
    ModelSpec,
    PeerRef,
    Peers,
    Reference,
    Uri,
)
from hypha.worker.allowance import Allowance


def code_of(reference: Reference, **config: object) -> str | None:
    try:
        Allowance(AllowConfig.model_validate(config)).check(reference)
    except Refused as exc:
        return exc.code
    return None


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://models.example.org/a/b.bin", None),
        ("HTTPS://MODELS.example.org/a", None),
        ("http://models.example.org/a", "not-allowed"),
        ("https://models.example.org.evil.com/a", "not-allowed"),
        ("https://models.example.org/x/../b.bin", None),
        ("https://models.example.org/%2e%2e/private", "invalid"),
        ("https://models.example.org/..%5cprivate", "invalid"),
        ("https://user@models.example.org/a", "invalid"),
        ("https://models.example.org@evil.com/a", "invalid"),
        ("file:///etc/passwd", "invalid"),
        ("https://", "invalid"),
        ("http://169.254.169.254/latest/meta-data", "not-allowed"),
    ],
)
def test_uri(url: str, code: str | None) -> None:
    assert code_of(Uri(value=url), uri=["https://models.example.org/*"]) == code


def test_dot_segments_are_resolved_before_the_pattern_is_asked() -> None:
    url = "https://models.example.org/public/../private"
    assert code_of(Uri(value=url), uri=["https://models.example.org/public/*"]) == "not-allowed"


def test_nothing_is_allowed_by_default_but_peers_and_the_hub() -> None:
    assert code_of(Uri(value="https://example.org/x")) == "not-allowed"
    assert code_of(Local(url="/etc/passwd")) == "not-allowed"
    assert code_of(HuggingFace(repository="acme/model")) is None
    assert code_of(Peers(peers=())) is None
    assert code_of(Peers(peers=()), peers=False) == "not-allowed"
    assert code_of(HuggingFace(repository="acme/model"), huggingface=["other/*"]) == "not-allowed"


def test_local_paths_are_resolved_first(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "secret").write_text("x")
    (allowed / "link").symlink_to(tmp_path / "secret")
    (allowed / "file").write_text("x")
    rules = [f"{allowed.resolve()}/*", "memory://ok/*", "s3://bucket/*"]
    for url, code in {
        f"{allowed}/file": None,
        f"file://{allowed}/file": None,
        f"{allowed}/link": "not-allowed",
        f"{allowed}/../secret": "not-allowed",
        f"local://{allowed}/link": "not-allowed",
        "relative": "invalid",
        "memory://ok/x": None,
        "memory://ok/../x": "invalid",
        "memory://other/x": "not-allowed",
        "s3://bucket/x::file:///etc/passwd": "invalid",
        "simplecache::s3://bucket/x": "invalid",
    }.items():
        assert code_of(Local(url=url), local=rules) == code, url


def refusal(job: object, **config: object) -> str | None:
    try:
        Allowance(AllowConfig.model_validate(config)).check_job(job)  # type: ignore[arg-type]
    except Refused as exc:
        return exc.reason
    return None


def test_jobs_are_checked_as_a_whole() -> None:
    job = train_job()
    assert refusal(job) is None
    assert "acme/tok" in (refusal(job, huggingface=["acme/model"]) or "")

    trusting = msgspec.structs.replace(job, model=msgspec.structs.replace(job.model, trust_remote_code=True))
    assert "trust_remote_code" in (refusal(trusting) or "")
    assert refusal(trusting, **{"trust-remote-code": ["acme/*"]}) is None

    torch = msgspec.structs.replace(
        job, model=ModelSpec(task="torch", entrypoint="os:system"), preprocessor=None
    )
    assert "os:system" in (refusal(torch) or "")
    assert refusal(torch, entrypoints=["os:*"]) is None


def test_place_of_checkpoints_is_checked_at_dispatch(tmp_path: Path) -> None:
    def job(place: str) -> AggregateJob:
        return AggregateJob(
            job_id="job",
            generation=0,
            executor=ExecutorDescriptor(kind="aggregate", name="ps"),
            me="me",
            scheduler=PeerRef(peer="scheduler"),
            model=ModelSpec(task="causal-lm"),
            checkpoint=CheckpointPolicy(place=place),
        )

    assert refusal(job("scheduler")) is None
    assert "allow.local" in (refusal(job(f"{tmp_path}/checkpoints")) or "")
    assert refusal(job(f"{tmp_path}/checkpoints"), local=[f"{tmp_path}/*"]) is None

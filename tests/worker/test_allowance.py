"""The owner's allow-lists, and the ways around them that are none."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.worker.test_process import train_job

from hypha.config.models import AllowConfig
from hypha.config.networks import UrlPattern
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
from hypha.worker.fetch.allowance import Allowance


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
        ("https://models.example.org:8443/a", "not-allowed"),
        ("https://models.example.org:443/a", None),
        ("https://models.example.org./a", "not-allowed"),
        ("https://models.example.org\\@evil.com/a", "invalid"),
        ("https://@models.example.org/a", "invalid"),
        ("https://models.example.org%2eevil.com/a", "invalid"),
        ("https://models.example.org/%252e%252e/private", "invalid"),
        ("https://models.example.org/a/..;/private", "invalid"),
    ],
)
def test_uri(url: str, code: str | None) -> None:
    assert code_of(Uri(value=url), uri=["https://models.example.org/*"]) == code


@pytest.mark.parametrize(
    ("pattern", "url", "allowed"),
    [
        ("https://*.good.org/*", "https://a.b.good.org/x", True),
        ("https://*.good.org/*", "https://good.org/x", False),
        ("https://*.good.org/*", "https://evilgood.org/x", False),
        ("https://*.good.org/*", "https://evil.com/.good.org/x", False),
        ("https://*/models/*", "https://evil.com/x/models/a", False),
        ("https://good.org:*/x", "https://good.org:99/x", True),
        ("https://good.org/*.bin", "https://good.org/private?.bin", False),
        ("https://good.org/get?id=*", "https://good.org/get?id=7", True),
        ("https://good.org/get?id=*", "https://good.org/get?to=7", False),
        ("http://[2001:db8::1]:80/*", "http://[2001:db8::1]/x", True),
        ("*", "http://anything.example/x?y", True),
    ],
)
def test_parts_of_a_url_are_matched_each_by_itself(pattern: str, url: str, allowed: bool) -> None:
    assert code_of(Uri(value=url), uri=[pattern]) == (None if allowed else "not-allowed")


@pytest.mark.parametrize(
    "pattern", ["https://good.org*", "https://g*d.org/x", "https://me@good.org/x", "good.org/x", "https:///x"]
)
def test_patterns_that_cannot_be_read_part_by_part_are_told(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"host|URL|user"):
        UrlPattern.parse(pattern)
    assert code_of(Uri(value="https://good.org.evil.com/x"), uri=[pattern]) == "not-allowed"


@pytest.mark.parametrize(
    ("pattern", "url", "code"),
    [
        ("s3://bucket/*", "s3://bucket/a", None),
        ("s3://bucket/a*", "s3://bucket/abc/d", None),
        ("s3://bucket/*", "s3://bucket-of-others/a", "not-allowed"),
        ("s3://bucket/*", "S3://evil@bucket/a", "not-allowed"),
        ("abfs://mine@account.example/*", "abfs://mine@account.example/a", None),
        ("*", "http://169.254.169.254/latest", "invalid"),
        ("*", "HTTPS://169.254.169.254/latest", "invalid"),
        ("*", "s3://bucket/a", None),
        ("s3://bucket/*", "s3://bucket/%252e%252e/other", "invalid"),
    ],
)
def test_other_urls_are_matched_part_by_part_too(pattern: str, url: str, code: str | None) -> None:
    assert code_of(Local(url=url), local_read=[pattern]) == code


def test_reading_and_writing_are_two_permissions(tmp_path: Path) -> None:
    rules = Allowance(AllowConfig(local_read=[f"{tmp_path}/models/*"], local_write=[f"{tmp_path}/kept/*"]))
    assert rules.read_local(f"{tmp_path}/models/a") == tmp_path / "models" / "a"
    assert rules.write_local(f"{tmp_path}/kept/a") == tmp_path / "kept" / "a"
    with pytest.raises(Refused, match=r"allow\.local_write"):
        rules.write_local(f"{tmp_path}/models/a")
    with pytest.raises(Refused, match=r"allow\.local_read"):
        rules.read_local(f"{tmp_path}/kept/a")


def test_owner_and_name_of_a_repository_are_matched_apart() -> None:
    for pattern, repository, code in (
        ("acme/*", "acme/model", None),
        ("acme*", "acme-evil/model", "not-allowed"),
        ("*model", "evil/model", "not-allowed"),
        ("gpt2", "gpt2", None),
        ("*", "acme/model", None),
        ("*", "../../etc", "invalid"),
        ("*", "acme/..", "invalid"),
    ):
        assert code_of(HuggingFace(repository=repository), huggingface=[pattern]) == code, (
            pattern,
            repository,
        )


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
        assert code_of(Local(url=url), local_read=rules) == code, url


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


@pytest.mark.parametrize(
    ("entrypoint", "allowed"),
    [
        ("acme.models:Net", True),
        ("acme.models.deep:net_2", True),
        ("acme.models:os.system", False),
        ("acme.models:Net.__init__", False),
        ("acme.models:", False),
        ("acme.models:Net:x", False),
        ("acme..models:Net", False),
        ("artifacts.1.evil:Net", False),
        ("acme_evil.models:Net", False),
        ("evil:acme", False),
    ],
)
def test_entrypoints_are_plain_names_below_the_allowed_package(entrypoint: str, allowed: bool) -> None:
    job = msgspec.structs.replace(
        train_job(), model=ModelSpec(task="torch", entrypoint=entrypoint), preprocessor=None
    )
    assert (refusal(job, entrypoints=["acme.*:*"]) is None) is allowed


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
    assert "allow.local_write" in (refusal(job(f"{tmp_path}/checkpoints")) or "")
    places = [f"{tmp_path}/*"]
    assert refusal(job(f"{tmp_path}/checkpoints"), local_read=places, local_write=places) is None
    # what could be written and not be read back would be found out when it is needed
    assert "allow.local_read" in (refusal(job(f"{tmp_path}/checkpoints"), local_write=places) or "")

"""``hypha report``: everything that helps, and no secret in any byte of it."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from pathlib import Path

import pytest
from tests.scheduler.test_history import ledger
from tests.scheduler.test_ledger import entry

from hypha.cli.job.report import report
from hypha.errors import HyphaError

#: of every kind, and one that JSON writes otherwise
SECRETS = {
    "model": "hf_modelmodelmodel",
    "preprocessor": "hf_preprocessor",
    "output": 'hf_"quoted\\output',
    "url": "bucket-password",
    "environment": "environment-token",
    "page": "page-token-page-token",
}
KEY = "-----BEGIN PRIVATE KEY-----\nMIIEsecretsecret\n-----END PRIVATE KEY-----\n"


def write_job(root: Path) -> Path:
    """A job whose every file has every secret in it."""
    state = root / "state" / "digits"
    state.mkdir(parents=True)
    ledger(state, entry(0), entry(1))
    everything = " ".join(SECRETS.values())
    with sqlite3.connect(state / "job.db") as db:
        aggregate = json.dumps({"tokens": list(SECRETS.values())})
        db.execute("INSERT INTO pool VALUES ('l', ?)", (aggregate,))
        db.execute(
            "INSERT INTO checkpoints VALUES (1, ?)", (f"s3://key:{SECRETS['url']}@bucket/{everything}",)
        )
    db.close()
    (state / "page-token").write_text(SECRETS["page"])
    (state / "journal.jsonl").write_text(json.dumps({"about": everything}) + "\n")
    (root / "scheduler.log").write_text(f"it said {everything}\n{KEY}the end\n")
    for name in ("cert", "trust"):
        (root / f"{name}.pem").write_text(f"{name}\n")
    (root / "key.pem").write_text(KEY)
    config = {
        "model": {"type": "causal-lm", "repository": "org/model", "token": SECRETS["model"]},
        "preprocessor": {"type": "tokenizer", "repository": "org/t", "token": SECRETS["preprocessor"]},
        "dataset": {"dataset": "d"},
        "rounds": {"inner_steps": 10},
        "output": "hf://org/out",
        "output_token": SECRETS["output"],
        "checkpoint": {"place": f"s3://key:{SECRETS['url']}@bucket/c"},
    }
    lines = [
        *('cert_pem = "cert.pem"', 'key_pem = "key.pem"', 'trust_pem = "trust.pem"'),
        'gateway_addresses = ["/ip4/203.0.113.1/tcp/1"]',
        f"scheduler = {{ job = {_toml(config)} }}",
    ]
    path = root / "scheduler.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def test_all_that_is_known_is_in_it_but_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_job(tmp_path)
    monkeypatch.setenv("SOME_TOKEN", SECRETS["environment"])
    monkeypatch.chdir(tmp_path)
    report(
        "digits", config=config, log=[tmp_path / "scheduler.log"], output=None, state_dir=tmp_path / "state"
    )
    path = tmp_path / "digits-report.tar.gz"
    assert path.stat().st_mode & 0o077 == 0
    with tarfile.open(path) as archive:
        found = {
            member.name.removeprefix("hypha-report/"): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
        }
    everything = b"\0".join(found.values())
    for name, secret in SECRETS.items():
        for form in (secret, json.dumps(secret)[1:-1]):
            assert form.encode() not in everything, name
    assert b"MIIE" not in everything
    assert b"PRIVATE KEY" not in everything
    assert set(found) == {
        *("README.txt", "job.json", "rounds.json", "versions.json", "config.json"),
        *("journal.jsonl", "nodes.json", "logs/1-scheduler.log"),
    }
    tables = json.loads(found["job.json"])
    assert [row["round"] for row in tables["rounds"]] == [0, 1]
    assert tables["rounds"][0]["entry"]["contributors"]
    assert [one["round"] for one in json.loads(found["rounds.json"])] == [0, 1]
    assert json.loads(found["config.json"])["scheduler"]["job"]["model"]["repository"] == "org/model"
    assert json.loads(found["versions.json"])["trio"][0].isdigit()
    assert b"it said" in found["logs/1-scheduler.log"]
    assert b"the end" in found["logs/1-scheduler.log"]


def contents(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix("hypha-report/"): archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive
        }


def test_the_configuration_that_is_here_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path).rename(tmp_path / "config.toml")
    monkeypatch.chdir(tmp_path)
    report("digits", None, None, None, Path("state"))
    found = contents(tmp_path / "digits-report.tar.gz")
    assert SECRETS["model"] not in "".join(found.values())
    assert "config.json" in found
    assert "of config.toml and of the environment were replaced" in found["README.txt"]
    assert capsys.readouterr().err == ""


def test_without_a_configuration_nobody_is_told_that_it_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    for text in (None, 'dataset = "of a data node"\n'):
        if text is not None:
            (tmp_path / "config.toml").write_text(text)
        report("digits", None, None, None, Path("state"))
        about = contents(tmp_path / "digits-report.tar.gz")["README.txt"]
        for told in (about, capsys.readouterr().err):
            assert "The scheduler's configuration was not known" in told
            assert "may still be in here" in told
            assert ("as config.toml here is none of a scheduler" in told) is (text is not None)


def test_without_a_job_or_a_log_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(HyphaError, match="there is no ledger"):
        report("digits", None, None, None, tmp_path)
    write_job(tmp_path)
    with pytest.raises(HyphaError, match=r"nothing\.log cannot be read"):
        report("digits", None, [tmp_path / "nothing.log"], tmp_path / "o.tar.gz", tmp_path / "state")
    assert not (tmp_path / "o.tar.gz").exists()

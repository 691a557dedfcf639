"""``[[scheduler.sinks]]``: what is wrong with them is said before a job begins, with the key's path."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypha.config import checks
from hypha.config.models import SchedulerConfig
from hypha.config.reading.loading import load_config
from hypha.errors import ConfigError

JOB = """\
cert_pem = "c.pem"
key_pem = "k.pem"
trust_pem = "t.pem"
gateway_addresses = ["/ip4/192.0.2.1/tcp/8080"]
[scheduler.job]
output = "out"
[scheduler.job.model]
type = "torch"
entrypoint = "package.module:Model"
[scheduler.job.dataset]
dataset = "digits"
[scheduler.job.rounds]
inner_steps = 1
"""


def load(tmp_path: Path, text: str) -> SchedulerConfig:
    file = tmp_path / "config.toml"
    file.write_text(JOB + text)
    return load_config(SchedulerConfig, file, environ={})


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]


def test_every_kind_and_a_directory_that_is_relative_to_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """\
[[scheduler.sinks]]
type = "tensorboard"
directory = "board"
[[scheduler.sinks]]
type = "wandb"
offline = true
token = "token-0123456789"
[[scheduler.sinks]]
type = "http"
url = "http://127.0.0.1:43800"
""",
    )
    board, wandb, http = config.scheduler.sinks
    assert (board.directory, board.project, board.token) == (tmp_path / "board", "hypha", None)
    assert (wandb.offline, wandb.token) == (True, "token-0123456789")
    assert http.url == "http://127.0.0.1:43800"
    assert "token-0123456789" not in repr(config)


def test_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    text = """\
[[scheduler.sinks]]
type = "mlflow"
[[scheduler.sinks]]
type = "http"
[[scheduler.sinks]]
type = "http"
url = "http://user:secret@127.0.0.1/"
offline = true
[[scheduler.sinks]]
type = "tensorboard"
url = "http://127.0.0.1"
[[scheduler.sinks]]
type = "wandb"
url = "wandb.example.org"
"""
    found = problems(tmp_path, text.replace('type = "mlflow"', 'type = "http"\nurl = "http://127.0.0.1:1"'))
    assert found == [
        "config.toml:17: scheduler.sinks[1].url: it says where the figures are sent, such as "
        "http://127.0.0.1:43800",
        "config.toml:21: scheduler.sinks[2].url: a secret has no place in an address; write it as token",
        "config.toml:22: scheduler.sinks[2].offline: only wandb has that",
        "config.toml:25: scheduler.sinks[3].url: TensorBoard has none; directory says where its files are "
        "written",
        "config.toml:28: scheduler.sinks[4].url: it should begin with http:// or https:// and name a host",
    ]
    assert problems(tmp_path, text)[0] == (
        "config.toml:15: scheduler.sinks[0].type: it should be 'tensorboard', 'trackio', 'wandb', 'aim' or "
        "'http', not 'mlflow'"
    )


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert problems(tmp_path, '[[scheduler.sinks]]\ntype = "wandb"\n') == [
        "config.toml:15: scheduler.sinks[0].type: the package wandb is not installed: "
        "pip install 'hypha-train[wandb]'"
    ]

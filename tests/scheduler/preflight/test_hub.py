"""Looking for a repository on the hub: what it refuses is certain, that it cannot be reached says nothing."""

from __future__ import annotations

from pathlib import Path

from tests.support.hub import Hub, Repository

from hypha.messages import HuggingFace
from hypha.scheduler.preflight.checking import ask_hub

KEY = "scheduler.job.model.repository"
FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"weights"}


def test_a_repository_gives_its_configuration_and_nothing_else(tmp_path: Path) -> None:
    hub = Hub({"us/model": Repository([FILES])})
    with hub.serve() as endpoint:
        found = ask_hub(KEY, HuggingFace(repository="us/model"), tmp_path, endpoint)
        assert found is None
        assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]
        assert not (tmp_path / "model.safetensors").exists()
        assert ask_hub(KEY, HuggingFace(repository="us/model"), None, endpoint) is None
        assert hub.tokens == {None}, "whoever runs the scheduler may have a token that workers do not have"
        one = HuggingFace(repository="us/model", filenames=("config.json", "tokenizer.json"))
        missing = ask_hub(KEY, one, tmp_path, endpoint)
    assert missing is not None
    assert missing.error
    assert missing.message.startswith("us/model@main has no file tokenizer.json")


def test_what_the_hub_refuses_is_said_with_what_to_change(tmp_path: Path) -> None:
    repositories = {
        "us/private": Repository([FILES], writer="secret", private=True),
        "us/gated": Repository([FILES], gated=True),
        "us/model": Repository([FILES]),
    }
    with Hub(repositories).serve() as endpoint:
        for reference, words in (
            (HuggingFace(repository="us/nowhere"), "not on the hub, or private"),
            (HuggingFace(repository="us/private"), "set a token"),
            (HuggingFace(repository="us/gated"), "needs a token that was granted access"),
            (HuggingFace(repository="us/model", revision="v9"), "no revision us/model@v9"),
            (HuggingFace(repository="no/such/name"), "is no name of a repository"),
        ):
            found = ask_hub(KEY, reference, tmp_path, endpoint)
            assert found is not None
            assert found.error
            assert found.key == KEY
            assert words in found.message
        allowed = ask_hub(KEY, HuggingFace(repository="us/private", token="secret"), tmp_path, endpoint)
        assert allowed is None
        assert (tmp_path / "config.json").exists()


def test_a_hub_that_cannot_be_asked_is_no_error(tmp_path: Path) -> None:
    hub = Hub({"us/model": Repository([FILES])})
    hub.broken = {"us/model"}
    with hub.serve() as endpoint:
        broken = ask_hub(KEY, HuggingFace(repository="us/model"), tmp_path, endpoint)
    gone = ask_hub(KEY, HuggingFace(repository="us/model"), tmp_path, endpoint)
    for found in (broken, gone):
        assert found is not None
        assert not found.error
        assert "cannot be asked for us/model@main from here" in found.message

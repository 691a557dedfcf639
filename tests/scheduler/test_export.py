"""Publishing: whole or not at all, and never over somebody's model."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import msgspec
import pytest
from tests.support.bucket import bucket
from tests.support.hub import Hub

from hypha.errors import OutputError
from hypha.scheduler.durable.export import (
    MARKER,
    HubOutput,
    LocalOutput,
    Published,
    UrlOutput,
    output_for,
)

__all__ = ["bucket"]

# huggingface_hub's own way of calling httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ABOUT = Published(job="digits", job_id="digits-1", rounds=3, samples=300, theta="abc")


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    path = tmp_path / "staged"
    (path / "sub").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "config.json").write_text("{}")
    (path / "sub" / "tokenizer.json").write_text("[]")
    return path


def test_places() -> None:
    assert isinstance(output_for("out"), LocalOutput)
    assert isinstance(output_for("file:///tmp/x"), LocalOutput)
    assert isinstance(output_for("s3://bucket/x"), UrlOutput)
    hub = output_for("hf://org/name@branch", "token")
    assert isinstance(hub, HubOutput)
    assert (hub.repository, hub.revision) == ("org/name", "branch")


def test_a_directory_gets_the_model_and_nothing_else(tmp_path: Path, staged: Path) -> None:
    output = output_for(str(tmp_path / "new" / "out"))
    output.check()
    assert list((tmp_path / "new").iterdir()) == []
    assert output.publish(staged, ABOUT) == str(tmp_path / "new" / "out")
    got = {path.name for path in (tmp_path / "new" / "out").rglob("*") if path.is_file()}
    assert got == {"model.safetensors", "config.json", "tokenizer.json", MARKER}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    about = msgspec.json.decode((tmp_path / "new" / "out" / MARKER).read_bytes(), type=Published)
    assert about.samples == 300
    assert {file.name: file.size for file in about.files}["sub/tokenizer.json"] == 2


def test_the_result_is_for_everybody_to_read(tmp_path: Path, staged: Path) -> None:
    for path in (staged, *staged.rglob("*")):
        path.chmod(0o700 if path.is_dir() else 0o600)
    out = Path(output_for(str(tmp_path / "out")).publish(staged, ABOUT))
    for path in (out, *out.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_an_earlier_model_is_moved_aside(
    tmp_path: Path, staged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    for text in ("first", "second"):
        (out).mkdir(exist_ok=True)
        (out / "mine.txt").write_text(text)
        LocalOutput(out).publish(staged, ABOUT)
    assert (tmp_path / "out.previous-1" / "mine.txt").read_text() == "first"
    assert (tmp_path / "out.previous-2" / "mine.txt").read_text() == "second"
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert f"What was in {out} is kept in {tmp_path / 'out.previous-2'}" in caplog.text


def test_the_directory_in_which_the_scheduler_runs_is_not_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in (".", ".."):
        with pytest.raises(OutputError, match="in which the scheduler runs"):
            output_for(place).check()
    output_for("out").check()


def test_a_failed_publication_leaves_the_old_model(tmp_path: Path, staged: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")
    (staged / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError):
        LocalOutput(out).publish(staged, ABOUT)
    assert (out / "model.safetensors").read_bytes() == b"old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_the_old_model_is_in_its_place_until_the_new_one_is_durable(
    tmp_path: Path, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"old")

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "the disk is broken", str(path))

    monkeypatch.setattr("hypha.files.staging.sync_tree", broken)
    with pytest.raises(OutputError):
        LocalOutput(out).publish(staged, ABOUT)
    assert (out / "model.safetensors").read_bytes() == b"old"


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        output_for(str(tmp_path / "out")).check()
    with pytest.raises(OutputError) as error:
        output_for(str(tmp_path / "out" / "below")).check()
    assert error.value.exit_code == 6


def test_a_directory_without_permission_is_said() -> None:
    # not even root may make a directory here
    with pytest.raises(OutputError, match="/proc/out"):
        output_for("/proc/out").check()


def test_an_unknown_or_unreachable_url_is_said() -> None:
    with pytest.raises(OutputError, match="nosuchscheme"):
        output_for("nosuchscheme://bucket/x").check()


def test_a_url_gets_the_marker_last(staged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid4().hex}/model"
    filesystem, path = fsspec.core.url_to_fs(url)
    output = output_for(url)
    output.check()
    assert filesystem.find(path) == []
    output.publish(staged, ABOUT)
    assert filesystem.cat_file(f"{path}/model.safetensors") == b"weights"
    # a second publication that is cut in the middle: the old marker is gone, so nothing looks complete
    put = type(filesystem).put_file

    def cut(self: object, source: str, target: str, **options: object) -> None:
        if source.endswith("tokenizer.json"):
            raise ConnectionError("the bucket is gone")
        put(self, source, target, **options)

    monkeypatch.setattr(type(filesystem), "put_file", cut)
    with pytest.raises(OutputError, match="bucket is gone"):
        output.publish(staged, ABOUT)
    assert not filesystem.exists(f"{path}/{MARKER}")
    assert not filesystem.exists(f"{path}/config.json")


def test_a_bucket_gets_the_model_whole(bucket: str, staged: Path) -> None:
    output = output_for(f"{bucket}/models/digits/")
    output.check()
    files, path = fsspec.url_to_fs(f"{bucket}/models/digits")
    assert files.find(path) == []
    (staged / "model-00002-of-00002.safetensors").write_bytes(b"a shard")
    output.publish(staged, ABOUT)
    (staged / "model-00002-of-00002.safetensors").unlink()
    files.pipe_file(f"{path}/README.md", b"mine")
    assert output.publish(staged, ABOUT) == f"{bucket}/models/digits"
    files.invalidate_cache()
    found = {str(one).removeprefix(f"{path}/") for one in files.find(path)}
    # what the earlier model had and this one has not is gone, what somebody else wrote is not
    assert found == {"model.safetensors", "config.json", "sub/tokenizer.json", MARKER, "README.md"}
    assert files.cat_file(f"{path}/model.safetensors") == b"weights"


def test_a_bucket_that_is_not_there_is_not_made(bucket: str) -> None:
    with pytest.raises(OutputError, match="nobodys-bucket"):
        output_for("s3://nobodys-bucket/model").check()
    assert not fsspec.filesystem("s3").exists("nobodys-bucket")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub of this process, where ada may write."""
    from huggingface_hub import constants

    served = Hub(users=("ada", "bob"))
    with served.serve() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # no token of whoever runs the tests
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served


def test_the_hub_gets_the_model_in_one_commit(hub: Hub, staged: Path) -> None:
    output = output_for("hf://ada/digits", "ada")
    output.check()
    assert hub.repositories["ada/digits"].files == {}
    assert output.publish(staged, ABOUT) == "hf://ada/digits"
    repository = hub.repositories["ada/digits"]
    assert len(repository.commits) == 2
    assert set(repository.files) == {"model.safetensors", "config.json", "sub/tokenizer.json", MARKER}
    assert repository.files["model.safetensors"] == b"weights"
    assert repository.messages == ["digits: 3 rounds, 300 samples"]
    assert msgspec.json.decode(repository.files[MARKER], type=Published).theta == "abc"
    # the repository may be there before, with what somebody else put in
    repository.commits.append({**repository.files, "README.md": b"mine"})
    output.check()
    (staged / "model.safetensors").write_bytes(b"better")
    output.publish(staged, ABOUT)
    assert repository.files["README.md"] == b"mine"
    assert repository.files["model.safetensors"] == b"better"


def test_a_branch_of_the_hub(hub: Hub, staged: Path) -> None:
    output = output_for("hf://ada/digits@trial", "ada")
    output.check()
    output.publish(staged, ABOUT)
    assert hub.repositories["ada/digits"].branch == "trial"
    assert "config.json" in hub.repositories["ada/digits"].files


@pytest.mark.parametrize(
    ("place", "token"), [("ada/digits", "mallory"), ("ada/digits", None), ("ada/d", "bob")]
)
def test_who_may_not_write_to_the_hub_is_told_before_training(
    hub: Hub, place: str, token: str | None
) -> None:
    with pytest.raises(OutputError, match=f"hf://{place}") as error:
        output_for(f"hf://{place}", token).check()
    assert error.value.exit_code == 6


@pytest.mark.parametrize("where", ["/blobs/", "/commit/", "/preupload/"])
def test_a_hub_that_breaks_has_no_half_of_a_model(hub: Hub, staged: Path, where: str) -> None:
    output = output_for("hf://ada/digits", "ada")
    output.check()
    hub.broken.add(where)
    with pytest.raises(OutputError, match="ada/digits"):
        output.publish(staged, ABOUT)
    assert hub.repositories["ada/digits"].files == {}
    hub.broken.clear()
    output.publish(staged, ABOUT)
    assert "config.json" in hub.repositories["ada/digits"].files

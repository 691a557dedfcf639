"""Storing at places: whole or not at all, and no more of it than was to be kept."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import trio
from tests.support.bucket import bucket
from tests.support.polling import until

from hypha.config.models import AllowConfig
from hypha.errors import Refused, TransferFailed
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.local import fetch_local, store_local

__all__ = ["bucket"]

MARKER = "state.json"
CHECKPOINT = {"theta.safetensors": b"t" * 1000, "momentum.safetensors": b"m" * 1000, MARKER: b"{}"}


def allowance(*local: str) -> Allowance:
    return Allowance(AllowConfig(local_read=list(local), local_write=list(local)))


def checkpoint(directory: Path, number: int) -> Path:
    path = directory / f"checkpoint-{number}"
    path.mkdir()
    for name, data in CHECKPOINT.items():
        (path / name).write_bytes(data + str(number).encode())
    return path


def names_in(url: str) -> list[str]:
    files, root = fsspec.url_to_fs(url)
    files.invalidate_cache()
    return sorted(str(path).removeprefix(root).lstrip("/") for path in files.find(root))


@pytest.fixture(params=["path", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Each kind of place."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/checkpoints/job"
    if request.param == "memory":
        return f"memory://{uuid4().hex}/job"
    path = str(tmp_path / "kept" / "job")
    return path if request.param == "path" else f"file://{path}"


async def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("theta")
    rules = allowance(f"{tmp_path}/checkpoints/*", "memory://worker-test/*")
    await store_local(tmp_path / "file", f"{tmp_path}/checkpoints/1/theta", rules)
    assert (tmp_path / "checkpoints" / "1" / "theta").read_text() == "theta"
    assert len(list((tmp_path / "checkpoints" / "1").iterdir())) == 1
    await store_local(tmp_path / "file", "memory://worker-test/2/theta", rules)
    assert fsspec.filesystem("memory").cat("/worker-test/2/theta") == b"theta"
    with pytest.raises(Refused):
        await store_local(tmp_path / "file", f"{tmp_path}/elsewhere", rules)
    (tmp_path / "checkpoints" / "plain").write_text("x")
    with pytest.raises(TransferFailed, match="plain"):
        await store_local(tmp_path / "file", f"{tmp_path}/checkpoints/plain/theta", rules)


async def test_checkpoints_are_kept_k_deep_and_read_back(tmp_path: Path, place: str) -> None:
    rules = allowance("*")
    for number in (2, 4, 6, 8):
        await store_local(checkpoint(tmp_path, number), f"{place}/{number}", rules, MARKER, 2)
    assert names_in(place) == sorted(f"{number}/{name}" for number in (6, 8) for name in CHECKPOINT)
    (tmp_path / "back").mkdir()
    fetched = await fetch_local(f"{place}/8", tmp_path / "back", rules)
    assert {path.name: path.read_bytes() for path in fetched} == {
        name: data + b"8" for name, data in CHECKPOINT.items()
    }


async def test_a_file_among_them_is_nobodys_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "kept" / "job"
    place.mkdir(parents=True)
    (place / "1").write_text("notes")
    rules = allowance(f"{tmp_path}/*")
    for number in (2, 3, 4):
        await store_local(checkpoint(tmp_path, number), f"{place}/{number}", rules, MARKER, 1)
    assert sorted(path.name for path in place.iterdir()) == ["1", "4"]


async def test_one_is_replaced_and_incomplete_ones_do_not_count(tmp_path: Path, place: str) -> None:
    rules = allowance("*")
    files, root = fsspec.url_to_fs(place)
    for name in ("3/theta.safetensors", "5/theta.safetensors", "5/stale", "9/theta.safetensors", "notes/x"):
        files.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{root}/{name}", b"x")
    for number in (2, 4, 5):
        await store_local(checkpoint(tmp_path, number), f"{place}/{number}", rules, MARKER, 2)
    kept = [f"{number}/{name}" for number in (4, 5) for name in CHECKPOINT]
    # what is of a round that is still to come, and what is not ours, stays
    assert names_in(place) == sorted([*kept, "9/theta.safetensors", "notes/x"])


@pytest.mark.parametrize("kind", ["path", "memory"])
async def test_cut_while_writing_it_does_not_look_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rules = allowance("*")
    place = str(tmp_path / "kept") if kind == "path" else f"memory://{uuid4().hex}"
    await store_local(checkpoint(tmp_path, 1), f"{place}/1", rules, MARKER, 3)
    (tmp_path / "again").mkdir()
    again = checkpoint(tmp_path / "again", 1)
    if kind == "path":
        monkeypatch.setattr("hypha.files.disks.os.fsync", _no_space)
    else:
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", _PutUntil("theta.safetensors"))
    with pytest.raises(TransferFailed, match="No space left"):
        await store_local(again, f"{place}/1", rules, MARKER, 3)
    if kind == "path":
        # one rename: the earlier one is still there, whole
        assert names_in(place) == sorted(f"1/{name}" for name in CHECKPOINT)
    else:
        assert f"1/{MARKER}" not in names_in(place)


_WRITER = """
import sys, trio
from pathlib import Path
from hypha.config.models import AllowConfig
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.local import store_local
rules = Allowance(AllowConfig(local_read=["*"], local_write=["*"]))
trio.run(store_local, Path(sys.argv[1]), sys.argv[2], rules, "state.json", 2)
"""


@pytest.mark.parametrize("place", ["path", "file", "s3"], indirect=True)
async def test_killed_while_writing_it_leaves_nothing_that_counts(tmp_path: Path, place: str) -> None:
    rules = allowance("*")
    await store_local(checkpoint(tmp_path, 1), f"{place}/1", rules, MARKER, 2)
    source = checkpoint(tmp_path, 2)
    # the second of three files never ends
    (source / "theta.safetensors").unlink()
    os.mkfifo(source / "theta.safetensors")
    writer = await trio.lowlevel.open_process([sys.executable, "-c", _WRITER, str(source), f"{place}/2"])
    try:
        await until(
            lambda: any("momentum" in name and not name.startswith("1/") for name in names_in(place)), 60
        )
        assert writer.poll() is None
    finally:
        writer.kill()
        await writer.wait()
    left = names_in(place)
    assert f"2/{MARKER}" not in left
    if not place.startswith("s3://"):
        assert not any(name.startswith("2/") for name in left)
    assert {f"1/{name}" for name in CHECKPOINT} < set(left)
    (source / "theta.safetensors").unlink()
    (source / "theta.safetensors").write_bytes(CHECKPOINT["theta.safetensors"] + b"2")
    await store_local(source, f"{place}/2", rules, MARKER, 2)
    assert names_in(place) == sorted(f"{number}/{name}" for number in (1, 2) for name in CHECKPOINT)


def _no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


class _PutUntil:
    """``put_file`` of a file system that is full when the file ``name`` comes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, files: Any, kind: type) -> Any:
        original = super(kind, files).put_file

        def put(source: str, target: str, **options: Any) -> None:
            if source.endswith(self._name):
                _no_space()
            original(source, target, **options)

        return put


async def test_a_place_that_cannot_be_written(tmp_path: Path, bucket: str) -> None:
    source = checkpoint(tmp_path, 1)
    for url in (f"{bucket}-of-somebody-else/1", "/proc/hypha/1", "nosuchscheme://x/1"):
        with pytest.raises(TransferFailed):
            await store_local(source, url, allowance("*"), MARKER)


async def test_what_an_executor_may_not_ask_for(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, 1)
    (tmp_path / "kept").mkdir()
    rules = allowance(f"{tmp_path}/kept/*")
    for keeping in (("../state.json",), ("..",), ("",), (MARKER, 0)):
        with pytest.raises(Refused):
            await store_local(source, f"{tmp_path}/kept/1", rules, *keeping)
    with pytest.raises(Refused, match="number"):
        await store_local(source, f"{tmp_path}/kept/latest", rules, MARKER, 1)
    assert list((tmp_path / "kept").iterdir()) == []


async def test_neither_links_nor_siblings_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    source = checkpoint(tmp_path, 7)
    (source / "link").symlink_to(tmp_path / "secret")
    for number in ("1", "6"):
        (tmp_path / "kept" / number).mkdir(parents=True)
        (tmp_path / "kept" / number / MARKER).write_text("{}")
    rules = allowance(f"{tmp_path}/kept/[67]")
    await store_local(source, f"{tmp_path}/kept/7", rules, MARKER, 1)
    assert names_in(str(tmp_path / "kept")) == sorted([f"1/{MARKER}", *(f"7/{name}" for name in CHECKPOINT)])

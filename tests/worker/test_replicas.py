"""Copies of checkpoints at a worker: whole, bounded, somebody's, and there after a restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from hypha.config.models import StorageConfig
from hypha.errors import Refused
from hypha.messages import CheckpointFile, CheckpointIndex, HoldCheckpoint, JobStamp, TransferMeta
from hypha.worker.storage import replicas
from hypha.worker.storage.replicas import ReplicaStore

ME, OTHER = "scheduler", "another"
LEASED = frozenset({ME, OTHER})
GB = 10**9


def content(round_: int, size: int = 100) -> dict[str, bytes]:
    return {"theta.safetensors": f"{round_:>{size}}".encode(), "state.json": f"{{{round_}}}".encode()}


def index_of(round_: int, files: dict[str, bytes], job_id: str = "job-1") -> CheckpointIndex:
    listed = tuple(
        CheckpointFile(name=name, size=len(data), blake3=blake3(data).hexdigest())
        for name, data in files.items()
    )
    return CheckpointIndex(job_id=job_id, round=round_, files=listed)


def request(index: CheckpointIndex, *keep: int, generation: int = 0) -> HoldCheckpoint:
    stamp = JobStamp(job_id=index.job_id, generation=generation)
    return HoldCheckpoint(stamp=stamp, job="job", index=index, keep=keep)


def meta_of(index: CheckpointIndex, file: CheckpointFile, generation: int = 0) -> TransferMeta:
    stamp = JobStamp(job_id=index.job_id, generation=generation)
    name = f"{index.round}/{file.name}"
    return TransferMeta(kind="checkpoint", name=name, size=file.size, blake3=file.blake3, stamp=stamp)


def send(store: ReplicaStore, index: CheckpointIndex, files: dict[str, bytes], caller: str = ME) -> None:
    """As the bulk plane does it."""
    for file in index.files:
        meta = meta_of(index, file)
        store.place_for(caller, meta).write_bytes(files[file.name])
        store.arrived(caller, meta)


def keep(store: ReplicaStore, round_: int, *rounds: int, job_id: str = "job-1", caller: str = ME) -> None:
    """A copy, from its announcement to its end."""
    files = content(round_)
    index = index_of(round_, files, job_id)
    assert store.hold(caller, request(index, *rounds), LEASED) == tuple(files)
    send(store, index, files, caller)
    assert store.hold(caller, request(index, *rounds), LEASED) == ()


def opened(path: Path, size: float = 1e6, days: float = 30.0) -> ReplicaStore:
    return ReplicaStore(path / "checkpoints", StorageConfig(checkpoints_gb=size / GB, keep_days=days))


def rounds_of(store: ReplicaStore, caller: str = ME) -> list[int]:
    return [index.round for index in store.find(caller, "job")]


def test_a_copy_is_whole_or_not_there_and_outlives_the_process(tmp_path: Path) -> None:
    store, files = opened(tmp_path), content(4)
    index = index_of(4, files)
    assert store.hold(ME, request(index), LEASED) == ("theta.safetensors", "state.json")
    first = meta_of(index, index.files[0])
    store.place_for(ME, first).write_bytes(files["theta.safetensors"])
    store.arrived(ME, first)
    assert store.hold(ME, request(index), LEASED) == ("state.json",)
    assert rounds_of(store) == []
    # the process ends half-way: nothing of it counts
    store = opened(tmp_path)
    assert rounds_of(store) == []
    assert store.used_bytes == 0
    keep(store, 4)
    assert store.used_bytes == sum(map(len, files.values()))
    for again in (store, opened(tmp_path)):
        assert again.find(ME, "job") == (index,)
        assert again.owners == {(ME, "job")}
        path, meta = again.file(ME, "job-1", "4/theta.safetensors")
        assert path.read_bytes() == files["theta.safetensors"]
        assert meta.blake3 == blake3(files["theta.safetensors"]).hexdigest()
        assert again.hold(ME, request(index), LEASED) == ()


def test_rounds_that_are_not_to_be_kept_go_but_never_the_last_whole_one(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, 2)
    keep(store, 4, 2, 4)
    assert rounds_of(store) == [4, 2]
    files = content(6)
    index = index_of(6, files)
    store.hold(ME, request(index, 4, 6), LEASED)
    assert rounds_of(store) == [4], "room is made before what comes comes"
    send(store, index, files)
    store.hold(ME, request(index, 4, 6), LEASED)
    assert rounds_of(store) == [6, 4]
    # K = 1: the old one stays until the new one is whole
    files = content(8)
    index = index_of(8, files)
    store.hold(ME, request(index, 8), LEASED)
    assert rounds_of(store) == [6, 4]
    send(store, index, files)
    store.hold(ME, request(index, 8), LEASED)
    assert rounds_of(store) == rounds_of(opened(tmp_path)) == [8]


def test_another_life_of_the_job_replaces_its_round(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, 4)
    keep(store, 6, 4, 6)
    files = content(6) | {"state.json": b"another"}
    index = index_of(6, files)
    assert store.hold(ME, request(index, 4, 6, generation=1), LEASED) == tuple(files)
    with pytest.raises(Refused, match="generation 1") as refused:
        store.hold(ME, request(index_of(5, content(5)), generation=0), LEASED)
    assert refused.value.code == "stale"
    for file in index.files:
        with pytest.raises(Refused, match="generation 1"):
            store.place_for(ME, meta_of(index, file, generation=0))
        meta = meta_of(index, file, generation=1)
        store.place_for(ME, meta).write_bytes(files[file.name])
        store.arrived(ME, meta)
    assert store.hold(ME, request(index, 4, 6, generation=1), LEASED) == ()
    path, _ = store.file(ME, "job-1", "6/state.json")
    assert path.read_bytes() == b"another"
    assert rounds_of(store) == [6, 4]


def test_what_the_owner_offers_is_not_exceeded(tmp_path: Path) -> None:
    size = sum(map(len, content(4).values()))
    store = opened(tmp_path, size=2.5 * size)
    keep(store, 4, job_id="job-1")
    keep(store, 4, job_id="job-2", caller=OTHER)
    index = index_of(4, content(4), "job-3")
    with pytest.raises(Refused, match=r"storage\.checkpoints_gb") as refused:
        store.hold(ME, request(index), LEASED)
    assert refused.value.code == "no-space"
    store.drop(OTHER, "job-2")
    assert store.hold(ME, request(index), LEASED) != ()
    # it was only announced, by somebody whose lease is over: there is room for others
    waiting = index_of(4, content(4), "job-4")
    with pytest.raises(Refused, match="free"):
        store.hold(OTHER, request(waiting), LEASED)
    assert store.hold(OTHER, request(waiting), frozenset({OTHER})) != ()
    with pytest.raises(Refused, match="announced"):
        store.place_for(ME, meta_of(index, index.files[0]))


def test_empty_files_take_places_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take no bytes of what the owner offers, and are remembered all the same."""
    monkeypatch.setattr(replicas, "MAX_FILES_KEPT", 10)
    store = opened(tmp_path)
    empty = {f"{number}": b"" for number in range(4)}
    for job_id in ("job-1", "job-2"):
        assert len(store.hold(ME, request(index_of(1, empty, job_id)), LEASED)) == 4
    with pytest.raises(Refused, match="10 files of checkpoints at most") as refused:
        store.hold(ME, request(index_of(1, empty, "job-3")), LEASED)
    assert refused.value.code == "no-space"
    # again: what was announced and never sent gives way to another announcement of that job
    assert len(store.hold(ME, request(index_of(2, empty, "job-2")), LEASED)) == 4
    store.drop(ME, "job-1")
    assert len(store.hold(OTHER, request(index_of(1, empty, "job-3")), LEASED)) == 4


def test_only_who_holds_a_lease_may_leave_one_where_storage_is_offered(tmp_path: Path) -> None:
    request_ = request(index_of(4, content(4)))
    with pytest.raises(Refused) as refused:
        opened(tmp_path).hold(ME, request_, frozenset({OTHER}))
    assert refused.value.code == "lease"
    with pytest.raises(Refused, match="offers no storage") as refused:
        opened(tmp_path, size=0).hold(ME, request_, LEASED)
    assert refused.value.code == "not-allowed"
    assert not (tmp_path / "checkpoints").exists()


def test_copies_belong_to_who_left_them(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, 4)
    index = index_of(6, content(6))
    assert store.find(OTHER, "job") == ()
    for attempt in (
        lambda: store.hold(OTHER, request(index), LEASED),
        lambda: store.file(OTHER, "job-1", "4/state.json"),
        lambda: store.drop(OTHER, "job-1"),
    ):
        with pytest.raises(Refused) as refused:
            attempt()
        assert refused.value.code == "uninvited"
    store.hold(ME, request(index), LEASED)
    with pytest.raises(Refused):
        store.place_for(OTHER, meta_of(index, index.files[0]))
    for name in ("4/nothing", "5/state.json", "x/state.json", "4"):
        with pytest.raises(Refused) as refused:
            store.file(ME, "job-1", name)
        assert refused.value.code == "not-found"
    store.drop(ME, "job-1")
    store.drop(ME, "job-1")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_nobody_asks_about_is_deleted_after_a_while(tmp_path: Path) -> None:
    store = opened(tmp_path, days=1)
    keep(store, 4, job_id="old")
    keep(store, 4, job_id="new")
    for job_id, age_days in (("old", 1.1), ("new", 0.9)):
        path = tmp_path / "checkpoints" / job_id
        at = path.stat().st_mtime - age_days * 86400
        os.utime(path, (at, at))
    store = opened(tmp_path, days=1)
    assert [index.job_id for index in store.find(ME, "job")] == ["new"]
    assert not (tmp_path / "checkpoints" / "old").exists()
    # asked about: it stays for another while
    assert (tmp_path / "checkpoints" / "new").stat().st_mtime > at + 0.8 * 86400


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "renamed"])
def test_what_is_not_whole_any_more_is_none(tmp_path: Path, damage: str) -> None:
    store = opened(tmp_path)
    keep(store, 4)
    directory = tmp_path / "checkpoints" / "job-1" / "round-4"
    match damage:
        case "cut":
            (directory / "theta.safetensors").write_bytes(b"x")
        case "gone":
            (directory / "theta.safetensors").unlink()
        case "index":
            (directory / "index.json").write_text("{")
        case "renamed":
            directory.rename(directory.with_name("round-5"))
    store = opened(tmp_path)
    assert rounds_of(store) == []
    keep(store, 4)


@pytest.mark.parametrize("job_id", ["", "..", "a/b", ".hidden", "x" * 200])
def test_job_ids_stay_inside(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(Refused, match="not the id"):
        opened(tmp_path).hold(ME, request(index_of(4, content(4), job_id)), LEASED)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "", "a/../../b", "index.json", "a//b", "x.part", "."]
)
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match="no name for a file"):
        opened(tmp_path).hold(ME, request(index_of(4, {name: b"x"})), LEASED)

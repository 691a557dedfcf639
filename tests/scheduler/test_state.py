"""The state directory and the checkpoints in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from hypha.errors import ConfigError, HyphaError, Refused
from hypha.messages import JobStamp, TransferMeta
from hypha.scheduler.durable.state_directory import CheckpointStore, StateDirectory


def test_one_scheduler_at_a_time(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job"):
        with pytest.raises(HyphaError, match="another scheduler"):
            StateDirectory(tmp_path, "job")
        StateDirectory(tmp_path, "other").close()
    StateDirectory(tmp_path, "job").close()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 200])
def test_a_name_stays_in_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        StateDirectory(tmp_path, name)


def test_an_earlier_state_is_kept_aside(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job") as state:
        assert state.move_aside("nothing there") is None
        for text in ("one", "two"):
            state.ledger.write_text(text)
            state.prepare()
            aside = state.move_aside("because")
            assert aside is not None
            assert (aside / "job.db").read_text() == text
        assert not state.ledger.exists()
        assert sorted(path.name for path in state.path.iterdir()) == ["lock", "old-1", "old-2"]


def meta_for(round_: int, name: str, data: bytes, generation: int = 0) -> TransferMeta:
    return TransferMeta(
        kind="checkpoint",
        name=name,
        size=len(data),
        blake3=blake3(data).hexdigest(),
        stamp=JobStamp(job_id="job", generation=generation, round=round_),
    )


def put(store: CheckpointStore, round_: int, name: str, data: bytes, generation: int = 0) -> None:
    """As the bulk plane does it."""
    meta = meta_for(round_, name, data, generation)
    store.place_for(meta).write_bytes(data)
    store.arrived(meta)


def test_a_checkpoint_appears_whole(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        store = CheckpointStore(state, "job", keep=2)
        put(store, 10, "theta.safetensors", b"theta")
        put(store, 10, "momentum.safetensors", b"momentum")
        assert not store.verify(10)
        with pytest.raises(Refused):
            store.files(10)
        assert store.complete(10)
        assert store.complete(10)
        assert store.verify(10)
        names = [meta.name for meta in store.files(10).files]
        assert names == ["10/momentum.safetensors", "10/theta.safetensors"]
        path, meta = store.file("10/theta.safetensors")
        assert path.read_bytes() == b"theta"
        assert meta.blake3 == blake3(b"theta").hexdigest()


def test_an_announced_checkpoint_without_files_is_none(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        assert not CheckpointStore(state, "job", keep=2).complete(3)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index", "foreign"])
def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, damage: str) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        store = CheckpointStore(state, "job", keep=2)
        put(store, 5, "theta.safetensors", b"theta")
        store.complete(5)
        path = state.checkpoints / "round-5" / "theta.safetensors"
        match damage:
            case "flip":
                path.write_bytes(b"thetb")
            case "cut":
                path.write_bytes(b"the")
            case "gone":
                path.unlink()
            case "index":
                (state.checkpoints / "round-5" / "index.json").write_text("{")
            case "foreign":
                store = CheckpointStore(state, "another", keep=2)
        assert not store.verify(5)


def test_old_checkpoints_go(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        store = CheckpointStore(state, "job", keep=2)
        for round_ in (1, 2, 3):
            put(store, round_, "theta", b"x")
            store.complete(round_)
        assert store.outdated([1, 2, 3]) == [1]
        store.keep_only([2, 3])
        assert sorted(path.name for path in state.checkpoints.iterdir()) == ["round-2", "round-3"]


def test_rounds_never_finished_make_room(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        store = CheckpointStore(state, "job", keep=2)
        put(store, 1, "theta", b"x")
        put(store, 9, "theta", b"x")
        assert sorted(path.name for path in state.incoming.iterdir()) == ["generation-0-round-9"]


def test_a_dead_parameter_servers_half_is_not_its_successors(tmp_path: Path) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        store = CheckpointStore(state, "job", keep=2)
        put(store, 4, "theta.safetensors", b"old theta")
        begun = meta_for(4, "momentum.safetensors", b"old momentum")
        half = store.place_for(begun)
        half.write_bytes(b"old")
        for name in ("theta", "momentum", "state"):
            assert store.place_for(meta_for(4, name, b"new", 1)) != half
            put(store, 4, name, b"new", 1)
        assert store.complete(4)
        assert {meta.name for meta in store.files(4).files} == {"4/theta", "4/momentum", "4/state"}
        assert store.verify(4)
        assert list(state.incoming.iterdir()) == []
        assert state.export_of(0) != state.export_of(1)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/../../b", "index.json"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with StateDirectory(tmp_path, "job") as state:
        state.prepare()
        store = CheckpointStore(state, "job", keep=2)
        with pytest.raises(Refused):
            store.place_for(TransferMeta(kind="checkpoint", name=name, size=1, blake3="00"))
        with pytest.raises(Refused):
            store.file(name)

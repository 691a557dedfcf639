"""The slice cache: bounds, reuse, damage, restarts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from blake3 import blake3

from hypha import runtime
from hypha.config.models import CacheConfig
from hypha.messages import SliceAssigned
from hypha.worker.slices.cache import SliceCache


def content(index: int, size: int = 1000) -> bytes:
    return bytes([index]) * size


def assigned(index: int, size: int = 1000, dataset: str = "digits") -> SliceAssigned:
    data = content(index, size)
    digest = blake3(data).hexdigest()
    return SliceAssigned(
        dataset=dataset, index=index, epoch=0, samples=1, size=size, blake3=digest, providers=()
    )


def insert(cache: SliceCache, *indices: int) -> None:
    for index in indices:
        path = cache.incoming(assigned(index))
        path.write_bytes(content(index))
        cache.insert(assigned(index), path)


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=3))
    insert(cache, 0, 1, 2)
    assert cache.link(assigned(0), tmp_path / "zero")
    insert(cache, 3)
    assert cache.cached("digits") == (0, 2, 3)
    assert cache.cached("other") == ()
    assert not cache.link(assigned(1), tmp_path / "one")
    assert (tmp_path / "zero").read_bytes() == content(0)
    assert stat.S_IMODE((tmp_path / "zero").stat().st_mode) == 0o400


def test_evicted_slices_stay_with_whoever_has_them(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=2))
    insert(cache, 0)
    assert cache.link(assigned(0), tmp_path / "zero")
    insert(cache, 1, 2)
    assert cache.cached("digits") == (1, 2)
    assert (tmp_path / "zero").read_bytes() == content(0)


def test_size_bound(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig(max_gb=2500e-9))
    insert(cache, 0, 1, 2)
    assert cache.cached("digits") == (1, 2)
    assert cache.size_bytes == 2000


def test_damaged_entries_are_not_used(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig())
    insert(cache, 0, 1)
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1])
    assert not cache.link(assigned(0), tmp_path / "zero")
    assert cache.cached("digits") == (1,)
    assert not (tmp_path / "zero").exists()


def test_restart_keeps_order_and_forgets_what_is_gone(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=3))
    insert(cache, 0, 1, 2)
    cache.link(assigned(0), tmp_path / "zero")
    (tmp_path / "cache" / f"{assigned(1).blake3}.safetensors").unlink()
    (tmp_path / "cache" / "stranger.safetensors").write_text("x")
    again = SliceCache(tmp_path / "cache", CacheConfig(max_slices=3))
    assert again.cached("digits") == (0, 2)
    assert again.datasets() == {"digits"}
    assert not (tmp_path / "cache" / "stranger.safetensors").exists()
    insert(again, 3, 4)
    assert again.cached("digits") == (0, 3, 4)


def test_broken_index_is_no_obstacle(tmp_path: Path) -> None:
    insert(SliceCache(tmp_path / "cache", CacheConfig()), 0)
    (tmp_path / "cache" / "index.json").write_text("{")
    assert len(SliceCache(tmp_path / "cache", CacheConfig())) == 0


def test_hash_from_the_network_is_no_path(tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig())
    evil = SliceAssigned(dataset="d", index=0, epoch=0, samples=1, size=1, blake3="../../x", providers=())
    with pytest.raises(ValueError, match="BLAKE3"):
        cache.incoming(evil)
    with pytest.raises(ValueError, match="BLAKE3"):
        cache.link(evil, tmp_path / "x")


def test_slices_make_room_for_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=8))
    insert(cache, 0, 1, 2)
    cache.require_space(1000)
    assert len(cache) == 3
    # more than any disk has: all that is here goes, and it still is not enough
    monkeypatch.setattr(runtime, "RESERVE_BYTES", 1 << 62)
    with pytest.raises(OSError, match=f"the disk of {tmp_path / 'cache'} is full") as failed:
        cache.require_space(1000)
    assert "make space" in str(failed.value)
    assert len(cache) == 0
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_an_index_that_cannot_be_written_costs_only_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=8))
    (tmp_path / "cache" / "index.json").mkdir()
    insert(cache, 0)
    assert cache.link(assigned(0), tmp_path / "zero")
    assert (tmp_path / "zero").read_bytes() == content(0)
    assert "index of the slice cache cannot be written" in caplog.text

"""Files at both ends of a transfer: half is never whole, and what cannot be kept is not kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3
from xxhash import xxh3_128

from hypha.messages import TransferMeta
from hypha.net.bulk.files import (
    DiskFailed,
    FileChanged,
    PartFile,
    SourceFile,
    WrongHash,
    copy_verified,
    free_bytes,
    hash_file,
    part_path,
)

CONTENT = os.urandom(3_000_000)


def meta(kind: str = "update", content: bytes = CONTENT) -> TransferMeta:
    """An update has no BLAKE3, whatever else has no XXH3."""
    if kind == "update":
        return TransferMeta(kind=kind, name="x", size=len(content), xxh3=xxh3_128(content).hexdigest())
    return TransferMeta(kind=kind, name="x", size=len(content), blake3=blake3(content).hexdigest())


@pytest.mark.parametrize("kind", ["update", "checkpoint"])
def test_a_part_becomes_the_file_when_whole_and_right(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "new" / "x"
    part = PartFile(destination, meta(kind))
    assert part.open(fresh=False) == 0
    part.write(CONTENT[:1_000_000])
    assert not destination.exists()
    part.write(memoryview(CONTENT)[1_000_000:])
    part.finish()
    assert destination.read_bytes() == CONTENT
    assert list(destination.parent.iterdir()) == [destination]
    assert destination.stat().st_mode & 0o077 == 0


def test_what_was_kept_is_gone_on_with(tmp_path: Path) -> None:
    first = PartFile(tmp_path / "x", meta())
    first.open(fresh=False)
    first.write(CONTENT[:2_500_000])
    first.keep()
    second = PartFile(tmp_path / "x", meta())
    assert second.open(fresh=False) == 2_500_000
    second.write(CONTENT[2_500_000:])
    second.finish()
    assert (tmp_path / "x").read_bytes() == CONTENT


@pytest.mark.parametrize("fresh", [True, False])
def test_a_part_too_long_or_unwanted_is_dropped(tmp_path: Path, fresh: bool) -> None:
    left = CONTENT[:5] if fresh else CONTENT + b"more"
    part_path(tmp_path / "x").write_bytes(left)
    part = PartFile(tmp_path / "x", meta())
    assert part.open(fresh) == 0
    part.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])])
def test_wrong_content_is_deleted(tmp_path: Path, content: bytes) -> None:
    part = PartFile(tmp_path / "x", meta())
    part.open(fresh=False)
    part.write(content)
    with pytest.raises(WrongHash):
        part.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskFailed, match="file/x"):
        PartFile(tmp_path / "file" / "x", meta()).open(fresh=False)
    (tmp_path / "directory").mkdir()
    part = PartFile(tmp_path / "directory", meta(content=b""))
    part.open(fresh=False)
    with pytest.raises(DiskFailed):
        part.finish()
    assert not part.path.exists()


def test_an_abandoned_part_is_closed_and_kept(tmp_path: Path) -> None:
    part_path(tmp_path / "x").write_bytes(CONTENT)
    part = PartFile(tmp_path / "x", meta())
    part.abandon()
    assert part.open(fresh=False) == 0
    assert part.path.read_bytes() == CONTENT
    before = len(os.listdir("/proc/self/fd"))
    other = PartFile(tmp_path / "x", meta())
    other.open(fresh=False)
    other.abandon()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_that_is_not_as_promised_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with pytest.raises(FileChanged, match="cannot be read"):
        SourceFile(source, 3)
    source.write_bytes(b"four")
    with pytest.raises(FileChanged, match="4 bytes, 3 were promised"):
        SourceFile(source, 3)
    file = SourceFile(source, 4)
    os.truncate(source, 0)
    with pytest.raises(FileChanged, match="shorter"):
        file.read_into(memoryview(bytearray(4)))
    file.close()


def test_a_copy_is_verified_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    copy_verified(source, tmp_path / "copy", meta())
    assert (tmp_path / "copy").read_bytes() == CONTENT
    source.write_bytes(bytes(len(CONTENT)))
    with pytest.raises(WrongHash):
        copy_verified(source, tmp_path / "other", meta())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]


def test_hash_and_room(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    assert hash_file(tmp_path / "x") == (len(CONTENT), blake3(CONTENT).hexdigest())
    assert (free_bytes(tmp_path / "not" / "there" / "yet") or 0) > 0

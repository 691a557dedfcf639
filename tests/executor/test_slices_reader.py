"""The order of samples, batches across slices, the books of a round, and prefetching."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hypha.errors import BatchFailed, SliceCorrupt
from hypha.executor.bridge.client import BridgeClient
from hypha.executor.inner.slices_reader import (
    RowStream,
    Slice,
    SliceReadAhead,
    read_columns,
    slice_order,
)
from hypha.executor.models.preprocessing import Padding, joined
from hypha.executor.threads import ThreadCondition
from hypha.messages import ExecutorDescriptor, InnerOptimizer, ModelSpec, PeerRef, SliceRange, TrainJob


def part(index: int, rows: int, epoch: int = 0, round: int = 0) -> Slice:
    columns = {"id": torch.arange(rows) + 1000 * index}
    return Slice(epoch, index, columns, slice_order(7, epoch, index, rows), (0, round, 0))


def test_the_order_is_numpys_philox_keyed_by_seed_epoch_and_slice() -> None:
    wanted = np.random.Generator(np.random.Philox(key=[42, 3 << 32 | 5])).permutation(17)
    assert slice_order(42, 3, 5, 17).tolist() == wanted.tolist()
    assert slice_order(42, 3, 5, 17, shuffle=False).tolist() == list(range(17))
    orders = {
        tuple(slice_order(*key, 17).tolist()) for key in ((42, 3, 5), (42, 3, 6), (42, 4, 5), (43, 3, 5))
    }
    assert len(orders) == 4
    assert sorted(slice_order(-1, 0, 0, 9).tolist()) == list(range(9))


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), count=st.integers(1, 15))
def test_every_row_comes_once_in_order_whatever_the_batch_size(sizes: list[int], count: int) -> None:
    stream = RowStream()
    parts = [part(index, rows) for index, rows in enumerate(sizes)]
    for each in parts:
        stream.push(each)
    wanted = torch.cat([each.columns["id"][each.order] for each in parts]).tolist()
    seen: list[int] = []
    while (batch := stream.take(count)) is not None:
        assert len(batch["id"]) == count
        seen += batch["id"].tolist()
    assert seen == wanted[: len(wanted) // count * count]
    assert stream.rows == len(wanted) % count
    told = [
        int(parts[piece.slice].columns["id"][parts[piece.slice].order[at]])
        for piece in stream.ranges
        for at in range(piece.start, piece.stop)
    ]
    assert told == seen
    assert len({(piece.slice) for piece in stream.ranges}) == len(stream.ranges)


def test_the_books_of_a_round_begin_where_the_last_ended() -> None:
    stream = RowStream()
    stream.push(part(0, 5))
    stream.push(part(1, 5))
    stream.take(3)
    stream.start_round()
    stream.take(4)
    assert stream.ranges == [
        SliceRange(epoch=0, slice=0, start=3, stop=5),
        SliceRange(epoch=0, slice=1, start=0, stop=2),
    ]
    assert stream.finished == [(0, 0)]


def test_dropping_forgets_old_slices_and_starts_newer_ones_from_their_first_row() -> None:
    stream = RowStream()
    for each in (part(0, 5, round=3), part(1, 5, round=4)):
        stream.push(each)
    stream.take(7)
    stream.drop_before((0, 4, 0))
    stream.start_round()
    assert stream.rows == 5
    stream.take(5)
    assert stream.ranges == [SliceRange(epoch=0, slice=1, start=0, stop=5)]


def test_slices_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(SliceCorrupt, match="columns"):
        joined([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], Padding())
    with pytest.raises(BatchFailed, match=r"rows of the column a have different shapes \(\[2\], \[3\]\)"):
        joined([{"a": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)}], Padding())
    with pytest.raises(BatchFailed, match="pixel_values"):
        joined(
            [{"pixel_values": torch.zeros(1, 3, 8, 8)}, {"pixel_values": torch.zeros(1, 3, 9, 8)}], Padding()
        )


def texts(rows: int, length: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.ones(rows, length, dtype=torch.int64), **more}


def test_sequences_of_different_lengths_are_filled_up_to_the_longest() -> None:
    short = texts(1, 2, labels=torch.tensor([[4, 5]]), attention_mask=torch.ones(1, 2, dtype=torch.int64))
    long = texts(1, 3, labels=torch.tensor([[6, 7, 8]]), attention_mask=torch.ones(1, 3, dtype=torch.int64))
    made = joined([short, long], Padding(token=9))
    assert made["input_ids"].tolist() == [[1, 1, 9], [1, 1, 1]]
    assert made["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert made["labels"].tolist() == [[4, 5, -100], [6, 7, 8]]
    left = joined([long, short], Padding(token=9, left=True))
    assert left["input_ids"].tolist() == [[1, 1, 1], [9, 1, 1]]
    assert left["labels"].tolist() == [[6, 7, 8], [-100, 4, 5]]


def test_filled_up_tokens_get_a_mask_where_there_is_none() -> None:
    made = joined([texts(1, 3), texts(2, 2)], Padding(token=9))
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert "attention_mask" not in joined([texts(1, 2), texts(2, 2)], Padding(token=9))


def test_features_of_sound_are_filled_up_with_its_own_value() -> None:
    one, two = torch.ones(1, 2, 4), torch.ones(1, 3, 4)
    made = joined([{"input_features": one}, {"input_features": two}], Padding(value=-1.5))["input_features"]
    assert made.shape == (2, 3, 4)
    assert made[0, 2].tolist() == [-1.5] * 4


def test_a_batch_is_the_same_however_its_rows_came_to_the_stream() -> None:
    """A replay cuts the slices where rounds ended."""

    def batches(*pieces: tuple[int, int, int]) -> list[dict[str, torch.Tensor]]:
        stream = RowStream(Padding(token=9))
        for index, start, stop in pieces:
            columns = {"input_ids": torch.arange(6 * (index + 2)).view(6, index + 2)}
            stream.push(Slice(0, index, columns, slice_order(7, 0, index, 6)[start:stop]))
        taken = []
        while (columns := stream.take(4)) is not None:
            taken.append(columns)
        return taken

    whole, cut = batches((0, 0, 6), (1, 0, 6)), batches((0, 0, 4), (0, 4, 6), (1, 0, 2), (1, 2, 6))
    assert [sorted(one) for one in whole] == [["input_ids"], ["attention_mask", "input_ids"], ["input_ids"]]
    for one, other in zip(whole, cut, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_broken_slice_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "slice-1").write_bytes(b"nonsense")
    save_file({"x": torch.zeros(3), "y": torch.zeros(4)}, tmp_path / "slice-2")
    save_file({"x": torch.zeros(())}, tmp_path / "slice-3")
    for name in ("slice-1", "slice-2", "slice-3", "slice-4"):
        with pytest.raises(SliceCorrupt, match=name):
            read_columns(tmp_path / name)


class Watched(ThreadCondition):
    """Says how often something has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = threading.Semaphore(0)

    def notify_all(self) -> None:
        super().notify_all()
        self.changes.release()


class Prefetcher(SliceReadAhead):
    """Gets slices when the test gives them, and says how often it asked."""

    def __init__(self, directory: Path) -> None:
        self.watched = Watched()
        client = BridgeClient(directory / "bridge.sock", directory)
        job = TrainJob(
            job_id="job",
            generation=0,
            executor=ExecutorDescriptor(kind="train", name="toy"),
            me="worker",
            scheduler=PeerRef(peer="scheduler"),
            parameter_server=PeerRef(peer="server"),
            model=ModelSpec(task="torch"),
            dataset="data",
            batch_size=4,
            optimizer=InnerOptimizer(),
        )
        super().__init__(client, job, None, self.watched)
        self.items: queue.SimpleQueue[Slice | Exception] = queue.SimpleQueue()
        self.asked = threading.Semaphore(0)

    async def fetch(self) -> Slice:
        self.asked.release()
        item = self.items.get()
        if isinstance(item, Exception):
            raise item
        return item

    def comes_to_be_ready(self) -> bool:
        while not self.ready:
            if not self.watched.changes.acquire(timeout=5):
                return False
        return True


def test_one_slice_is_kept_ready_and_no_more(tmp_path: Path) -> None:
    prefetcher = Prefetcher(tmp_path)
    prefetcher.start()
    assert prefetcher.asked.acquire(timeout=5)
    assert prefetcher.take() is None
    prefetcher.items.put(part(0, 3))
    assert prefetcher.comes_to_be_ready()
    assert not prefetcher.asked.acquire(timeout=0.05)
    found = prefetcher.take()
    assert found is not None
    assert found.index == 0
    assert prefetcher.asked.acquire(timeout=5)
    # what is being fetched for a round that is over is dropped as well
    prefetcher.drop_before((0, 5, 0))
    prefetcher.items.put(part(1, 3, round=4))
    assert prefetcher.asked.acquire(timeout=5)
    prefetcher.items.put(part(2, 3, round=5))
    assert prefetcher.comes_to_be_ready()
    found = prefetcher.take()
    assert found is not None
    assert found.index == 2
    prefetcher.items.put(SliceCorrupt("slice 9 is broken"))
    assert prefetcher.comes_to_be_ready()
    with pytest.raises(SliceCorrupt, match="slice 9"):
        prefetcher.take()


def test_a_ready_slice_of_an_old_round_is_dropped(tmp_path: Path) -> None:
    prefetcher = Prefetcher(tmp_path)
    prefetcher.start()
    prefetcher.items.put(part(0, 3, round=2))
    assert prefetcher.comes_to_be_ready()
    prefetcher.drop_before((0, 2, 0))
    assert prefetcher.ready
    prefetcher.drop_before((0, 3, 0))
    assert not prefetcher.ready
    prefetcher.items.put(SliceCorrupt("the end"))
    assert prefetcher.comes_to_be_ready()

"""What the tools' own readers find of what the sinks wrote."""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.support.polling import until
from wandb.proto.wandb_internal_pb2 import Record

from hypha.sinks import Destination, RoundValues, RunInfo, SinkProcess

RUN = RunInfo("job-0123", {"seed": 7, "inner_optimizer": {"learning_rate": 0.25}})


def values(round_: int, loss: float) -> RoundValues:
    return RoundValues(round_, 1000.0 + round_, {"loss": loss}, {"worker-1": {"loss": 2 * loss}})


async def record(destination: Destination, *rounds: tuple[int, float]) -> None:
    """What one scheduler records."""
    sink = SinkProcess(destination, RUN)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sink.run)
        for round_, loss in rounds:
            sink.put(values(round_, loss))
        try:
            # libraries are imported, on a machine that may be busy
            await until(lambda: not sink.waiting, 60)
        finally:
            sink.close(30.0)
    assert sink.dropped == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_tensorboard_shows_each_round_once_though_the_job_went_back(tmp_path: Path) -> None:
    destination = Destination("tensorboard", "hypha", "digits", str(tmp_path))
    await record(destination, (1, 4.0), (2, 3.0), (3, 2.0))
    # a scheduler that was started again, from the checkpoint of round 1; and a life that goes back itself
    await record(destination, (2, 2.5), (3, 1.5), (4, 1.25), (3, 1.0), (4, 0.5))
    read = EventAccumulator(str(tmp_path / RUN.job_id))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("loss")] == [(1, 4.0), (2, 2.5), (3, 1.0), (4, 0.5)]
    assert [one.wall_time for one in read.Scalars("loss")] == [1001.0, 1002.0, 1003.0, 1004.0]
    assert [one.value for one in read.Scalars("loss/worker-1")] == [8.0, 5.0, 2.0, 1.0]


async def test_wandb_offline(tmp_path: Path) -> None:
    destination = Destination("wandb", "hypha", "digits", str(tmp_path), token="k" * 40, offline=True)
    await record(destination, (1, 4.0), (2, 3.0))
    await record(destination, (3, 2.0))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    rows = []
    for path in files:
        records = list(_records(path))
        (run,) = (one.run for one in records if one.HasField("run"))
        assert (run.run_id, run.project, run.display_name) == ("job-0123", "hypha", "digits")
        config = {item.key or item.nested_key[0]: item.value_json for item in run.config.update}
        assert (config["seed"], config["inner_optimizer"]) == ("7", '{"learning_rate":0.25}')
        for one in records:
            if one.HasField("history"):
                row = {item.key or item.nested_key[0]: item.value_json for item in one.history.item}
                rows.append((row["round"], row["loss"], row["loss/worker-1"]))
    assert [tuple(map(float, row)) for row in rows] == [(1, 4.0, 8.0), (2, 3.0, 6.0), (3, 2.0, 4.0)]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"k" * 40 not in path.read_bytes(), path


@pytest.mark.extra
async def test_trackio(tmp_path: Path) -> None:
    destination = Destination("trackio", "digits", "a name", str(tmp_path))
    await record(destination, (1, 4.0), (2, 3.0))
    await record(destination, (3, 2.0))
    connection = sqlite3.connect(f"file:{tmp_path / 'digits.db'}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            "SELECT run_name, step, run_id, metrics FROM metrics ORDER BY id"
        ).fetchall()
    finally:
        connection.close()
    assert [row[:2] for row in rows] == [("job-0123", 1), ("job-0123", 2), ("job-0123", 3)]
    assert len({row[2] for row in rows}) == 1
    assert b'"loss/worker-1":4.0' in rows[-1][3]


def _records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file, as W&B's own messages: it is LevelDB's log format, after a header of
    seven bytes.
    """
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        # full, or last
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""

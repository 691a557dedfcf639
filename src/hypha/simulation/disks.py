"""The disks of simulated machines: a data node's dataset, files of a process that has ended, a full disk."""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
from pathlib import Path

import numpy as np

from hypha.data.manifest import make_manifest, write_manifest
from hypha.data.slices import write_slice
from hypha.executor.toy import COLUMN
from hypha.messages import Column
from hypha.simulation.configurations import DATASET


def make_dataset(directory: Path, slices: int, rows: int) -> None:
    """``slices`` slices of ``rows`` numbered rows each."""
    directory.mkdir()
    columns = (Column(name=COLUMN, dtype="I64", shape=()),)
    for index in range(slices):
        record = np.zeros(rows, dtype=[(COLUMN, "<i8")])
        record[COLUMN] = np.arange(index * rows, (index + 1) * rows)
        write_slice(directory / f"slice-{index:04}.safetensors", columns, record)
    write_manifest(directory, make_manifest(directory, DATASET))


def close_files(directory: Path) -> None:
    """What the kernel does for a process that has ended: locks go with their descriptors. SQLite's are left:
    a connection that is never used again locks nothing.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(f"{directory}/") and ".db" not in target:
                os.close(int(name))


def fill_databases(directory: Path, full: bool) -> None:
    """SQLite's own limit of pages stands in for the disk's."""
    for found in [one for one in gc.get_objects() if type(one) is sqlite3.Connection]:
        with contextlib.suppress(sqlite3.Error):
            ((_, _, path),) = found.execute("PRAGMA database_list").fetchall()[:1]
            if path.startswith(f"{directory}/"):
                (pages,) = found.execute("PRAGMA page_count").fetchone()
                found.execute(f"PRAGMA max_page_count = {pages if full else 1 << 30}")

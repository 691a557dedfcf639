"""Reads prepared datasets back, the way a worker would: file by file, in the manifest's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from hypha.data import load_dataset_directory

Array = npt.NDArray[Any]


def read_dataset(directory: Path) -> dict[str, Array]:
    """All columns of a dataset, slices one after the other."""
    parts = [load_file(path) for path in load_dataset_directory(directory).paths]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_slices(directory: Path, count: int = 3, samples: int = 4, seed: int = 0) -> Path:
    """A directory of slice files without a manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        save_file(
            {
                "pixel_values": random.random((samples, 1, 2, 2)).astype(np.float32),
                "labels": random.integers(0, 10, samples),
            },
            directory / f"part-{number}.safetensors",
        )
    return directory

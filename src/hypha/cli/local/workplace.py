"""A throw-away network's directory and environment, and scikit-learn's digits for it to train on."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from hypha.cli.local.children import Children, NetworkFailed
from hypha.config.environment import process_environment

DATASET = "digits"
LABELS = 10
#: Longest path of a directory for sockets, in bytes.
MAX_TEMPORARY = 70

#: A ResNet (He et al. 2015) small enough for 8 x 8 pixels; 79,000 parameters, with BatchNorm buffers.
MODEL = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "num_channels": 1,
    "embedding_size": 32,
    "hidden_sizes": [32, 64],
    "depths": [1, 1],
    "layer_type": "basic",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "id2label": {str(label): str(label) for label in range(LABELS)},
    "label2id": {str(label): label for label in range(LABELS)},
}


@contextmanager
def open_directory(name: str, directory: Path | None, keep: bool = False) -> Iterator[Path]:
    """An empty directory: the one asked for, which stays, or a temporary one, which goes unless ``keep``."""
    if directory is not None:
        root = directory.absolute()
        if root.exists() and any(root.iterdir()):
            raise NetworkFailed(f"{root} is not empty; choose a new directory with --dir", 2)
        root.mkdir(parents=True, exist_ok=True)
        yield root
        return
    root = Path(tempfile.mkdtemp(prefix=f"hypha-{name}-"))
    try:
        yield root
    finally:
        if keep:
            print(f"kept {root}")
        else:
            shutil.rmtree(root)


def clean_environment(root: Path) -> dict[str, str]:
    """Nothing of the user's own Hypha set-up, nothing written outside the directory."""
    for name in ("tmp", "cache"):
        (root / name).mkdir(exist_ok=True)
    inherited = {
        name: value
        for name, value in process_environment().items()
        if not name.startswith(("HYPHA_", "OTEL_")) and name != "RUST_LOG"
    }
    # a Unix socket's path has 107 bytes at most: in a deep directory the user's own TMPDIR must do
    if len(os.fsencode(root / "tmp")) <= MAX_TEMPORARY:
        inherited["TMPDIR"] = str(root / "tmp")
    return {
        **inherited,
        "HF_HOME": str(root / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


async def prepare_digits(root: Path, group: Children, copies: int = 1) -> None:
    """Into ``dataset`` and, a fifth of them, ``held-out`` go scikit-learn's digits (1797 images of 8 x 8), as
    the arrays that a Hugging Face classifier takes, ``copies`` times; into ``untrained`` the model's
    config.json, without weights: those come from training.
    """
    await trio.to_thread.run_sync(_write_digits, root / "raw", copies)
    (root / "untrained").mkdir()
    (root / "untrained" / "config.json").write_text(json.dumps(MODEL, indent=2))
    await group.run(
        "prepare",
        "hypha.cli.data",
        "prepare",
        str(root / "raw"),
        *("--output", str(root / "dataset")),
        *("--name", DATASET),
        *("--slice-samples", "60"),
        *("--holdout", "0.2"),
        *("--holdout-output", str(root / "held-out")),
    )


def _write_digits(raw: Path, copies: int) -> None:
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    raw.mkdir()
    # 0..16 -> 0..1, and a channel axis
    pixels = (digits.images[:, None] / 16.0).astype(np.float32)
    np.save(raw / "pixel_values.npy", np.concatenate([pixels] * copies))
    np.save(raw / "labels.npy", np.concatenate([digits.target.astype(np.int64)] * copies))


def digits_job(root: Path, workers: int, **keys: Any) -> dict[str, Any]:
    """The ``[scheduler.job]`` that trains that model on them, with further ``keys``."""
    needs = {"cpu": 1, "memory": 2, "storage": 0, "gpu": 0}
    places = {"num_workers": workers, "worker": needs, "parameter_server": needs}
    return {
        "model": {"type": "image-classification", "path": str(root / "untrained")},
        "dataset": {"dataset": DATASET},
        **keys,
        "resources": places | keys.get("resources", {}),
    }

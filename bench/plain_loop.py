"""The reference for training: ``python -m bench.plain_loop '{...}'``, a plain PyTorch loop and nothing else.

Data in memory, shuffled once; AdamW with the job's defaults; no gradients kept, no loss read.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

from bench import models


def train(told: dict[str, Any]) -> None:
    """``batches`` steps; when they happened goes where :mod:`bench.models` writes it."""
    torch.set_num_threads(told["threads"])
    data = torch.from_numpy(np.load(told["data"]))
    data = data[torch.randperm(len(data))]
    model = models.transformer(**told["model"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    size = told["batch_size"]
    at = 0
    for _ in range(told["batches"]):
        if at + size > len(data):
            at = 0
        loss = model(data[at : at + size])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        at += size


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))

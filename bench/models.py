"""Models for jobs of benchmarks, and a clock in their executors.

Workers import this as an entrypoint. With ``HYPHA_BENCH_TIMES`` in an executor's environment the monotonic
times at which its forward passes begin and its optimizer steps end go to ``<that directory>/<incarnation>``,
a line each: what is measured is the trainer as it is, from outside.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

TIMES = "HYPHA_BENCH_TIMES"


class Stack(nn.Module):
    """``count`` square matrices of which hardly anything is computed: all synchronisation."""

    def __init__(self, count: int, side: int) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(side, side) * 0.01 for _ in range(count))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        column = x.new_zeros(len(self.matrices[0]))
        for matrix in self.matrices:
            column = column + matrix[0]
        return {"loss": (x.mean() - column.mean()).square()}


class Transformer(nn.Module):
    """A small causal transformer over bytes."""

    def __init__(self, width: int, layers: int, heads: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.mask: Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        tokens = tokens.long()
        hidden = self.layers(self.embedding(tokens) + self.positions, mask=self.mask, is_causal=True)
        logits = self.head(hidden[:, :-1])
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())}


def stack(count: int, side: int) -> nn.Module:
    """Entrypoint."""
    return _clocked(Stack(count, side))


def transformer(width: int, layers: int, heads: int, length: int, vocabulary: int) -> nn.Module:
    """Entrypoint."""
    return _clocked(Transformer(width, layers, heads, length, vocabulary))


def _clocked(model: nn.Module) -> nn.Module:
    directory = os.environ.get(TIMES)
    if directory is None:
        return model
    # kept open for the life of the process
    file = (Path(directory) / Path.cwd().name).open("ab", buffering=0)

    def began(*_: Any) -> None:
        file.write(b"forward %.6f\n" % time.monotonic())

    def stepped(*_: Any) -> None:
        file.write(b"step %.6f\n" % time.monotonic())

    model.register_forward_pre_hook(began)
    register_optimizer_step_post_hook(stepped)
    return model

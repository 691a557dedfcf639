"""A model of eight numbers, for simulated worlds, in which everything else is as in real executors.

It is one vector ``w`` that is pulled towards targets made from each row's number; its buffer counts rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 8
#: the dataset's only column, and the argument of the model: the number of each row
COLUMN = "row"


class ToyModel(nn.Module):
    """The same whenever it is built."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(SIZE, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("rows", torch.zeros(1))

    def forward(self, row: Tensor) -> dict[str, Tensor]:
        """``row``: (rows,); the loss is a scalar."""
        self.rows += len(row)
        targets = torch.sin(row.to(torch.float32)[:, None] * torch.arange(1, SIZE + 1))
        return {"loss": (self.w - targets).mean(0).square().sum()}


def one_thread_only() -> None:
    """So small a model is not worth another thread."""
    torch.set_num_threads(1)

"""How large each update of a round is, and how far it points where the mean of all does.

The cosine between an update and the mean is only known when the mean is, and by then the update's file has
been written over. So each update leaves a sketch of 4096 numbers behind: its elements are laid out in rows of
that length, each row gets a sign that is fixed by chance, and the rows are summed. Sketches are linear, so
that of the mean follows from those of the updates, and a product of two sketches is, on average over the
signs, the product of the vectors themselves (as in a count sketch; Charikar et al. 2002). A cosine is thus an
estimate, with an error of about 1/sqrt(4096) = 0.016; where all updates are the same it is exactly 1.

A sketch takes one product of a matrix and a vector a chunk, over memory that the norm has just brought into
the cache. Of a model with more than 8 chunks (2 million parameters) as many, evenly spread, stand for all.
Neither the sums nor their order are touched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hypha.executor.files.tensors import CHUNK
from hypha.messages import UpdateStatistics

WIDTH = 4096
_SIGNS_SEED = 0x5EED
_MOST_CHUNKS = 8


@dataclass(frozen=True)
class JudgedUpdate:
    """An update, in the file at ``path``, that may be added to the sum with ``weight``. ``recorded`` says by
    what it and its buffers are multiplied, where that is known, as in a replay.
    """

    worker: str
    samples: int
    norm: float
    sketch: Tensor
    weight: float
    size_bytes: int
    path: Path
    recorded: UpdateStatistics | None


class Agreement:
    """Of the updates of one round after the other. ``spans`` are the chunks of all parameters, in order."""

    def __init__(self, spans: Sequence[tuple[str, int]]) -> None:
        stride = max(1, math.ceil(len(spans) / _MOST_CHUNKS))
        drawn = list(spans)[::stride]
        chance = torch.Generator().manual_seed(_SIGNS_SEED)
        rows = math.ceil(CHUNK / WIDTH)
        signs = torch.randint(0, 2, (len(drawn), rows), generator=chance).to(torch.float32).mul_(2).sub_(1)
        self._signs = dict(zip(drawn, signs, strict=True))
        #: updates in the sum, and what each was multiplied by
        self._added: list[tuple[JudgedUpdate, float]] = []

    def draw(self, span: tuple[str, int], piece: Tensor, sketch: Tensor) -> None:
        """Add the chunk ``piece`` (fp32, on the CPU, contiguous) at ``span`` to ``sketch``, which has
        ``WIDTH`` elements. From any thread.
        """
        signs = self._signs.get(span)
        if signs is None:
            return
        rows, rest = divmod(piece.numel(), WIDTH)
        if rows:
            sketch.addmv_(piece[: rows * WIDTH].view(rows, WIDTH).t(), signs[:rows])
        if rest:
            sketch[:rest].add_(piece[rows * WIDTH :], alpha=float(signs[rows]))

    def accept(self, update: JudgedUpdate, clip: float) -> None:
        """It is in the sum, multiplied by its weight and by ``clip``."""
        self._added.append((update, clip))

    def norms(self) -> tuple[float, ...]:
        """Of the updates of the open round, as they were sent."""
        return tuple(update.norm for update, _ in self._added)

    def close(self) -> tuple[UpdateStatistics, ...]:
        """Of the round's updates, in the order in which they were added; the next round begins."""
        added, self._added = self._added, []
        mean = torch.zeros(WIDTH, dtype=torch.float64)
        for update, clip in added:
            mean.add_(update.sketch, alpha=update.weight * clip)
        return tuple(
            UpdateStatistics(
                worker=update.worker,
                norm=update.norm,
                cosine=_cosine(update.sketch, mean),
                size_bytes=update.size_bytes,
                clip=clip,
            )
            for update, clip in added
        )


def _cosine(one: Tensor, other: Tensor) -> float | None:
    """None where one of them is zero, or too small or large to tell."""
    one = one.to(torch.float64)
    lengths = float(one.norm()) * float(other.norm())
    if not (math.isfinite(lengths) and lengths > 0.0):
        return None
    return max(-1.0, min(1.0, float(torch.dot(one, other)) / lengths))

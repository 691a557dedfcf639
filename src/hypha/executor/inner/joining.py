"""Rows of several slices in one batch: concatenated, and padded where they are sequences of different
lengths.

What a batch is depends on its rows and on the job alone, in training and in a replay alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hypha.errors import BatchFailed, SliceCorrupt
from hypha.executor.models.label_types import IGNORED

#: sequences of numbers that are filled up with a model's own padding value
_VALUES = frozenset(("input_values", "input_features"))
#: sequences filled up with zeros, beside what ends in ``_mask``
_ZEROS = frozenset(("token_type_ids", "position_ids", "global_attention_mask", "bbox"))


@dataclass(frozen=True)
class Padding:
    """With what sequences are filled up, and on which side. ``token`` is a token's id, ``value`` a sample's
    value.
    """

    token: int = 0
    value: float = 0.0
    left: bool = False

    def of(self, column: str, dtype: torch.dtype) -> float | None:
        """What the column is filled up with; None where it is no sequence, and may not be filled up."""
        if column in ("labels", "label"):
            return None if dtype.is_floating_point else IGNORED
        if column.endswith("special_tokens_mask"):
            return 1
        if column in _ZEROS or column.endswith("_mask"):
            return 0
        if column in _VALUES:
            return self.value
        if column.endswith("input_ids"):
            return self.token
        return None


def joined(pieces: Sequence[Mapping[str, Tensor]], padding: Padding) -> dict[str, Tensor]:
    """The rows of all pieces, in order. Raises :class:`SliceCorrupt` when their columns are not the same, and
    :class:`BatchFailed` when rows of a column are of different shapes, and are no sequences.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return dict(first)
    if any(piece.keys() != first.keys() for piece in pieces):
        raise SliceCorrupt("slices of one dataset differ in their columns")
    ragged = _ragged(pieces)
    if ragged and "input_ids" in ragged and "attention_mask" not in first:
        # else padding would be attended to, and learnt
        pieces = [
            {**piece, "attention_mask": torch.ones_like(piece["input_ids"], dtype=torch.int64)}
            for piece in pieces
        ]
        ragged.add("attention_mask")
    return {
        name: torch.cat(_filled(name, [piece[name] for piece in pieces], padding))
        if name in ragged
        else torch.cat([piece[name] for piece in pieces])
        for name in pieces[0]
    }


def _ragged(pieces: Sequence[Mapping[str, Tensor]]) -> set[str]:
    first = pieces[0]
    return {name for name in first if any(piece[name].shape[1:] != first[name].shape[1:] for piece in pieces)}


def _filled(name: str, parts: list[Tensor], padding: Padding) -> list[Tensor]:
    fill = padding.of(name, parts[0].dtype)
    rests = {tuple(part.shape[2:]) for part in parts}
    if fill is None or len(rests) != 1 or min(part.dim() for part in parts) < 2:
        shapes = sorted({str(list(part.shape[1:])) for part in parts})
        raise BatchFailed(
            f"rows of the column {name} have different shapes ({', '.join(shapes)}) in different slices, so "
            "they do "
            "not go into one batch; prepare the dataset with one size, or have the preprocessor make one"
        )
    length = max(part.shape[1] for part in parts)
    filled = []
    for part in parts:
        lacking = length - part.shape[1]
        sides = (lacking, 0) if padding.left else (0, lacking)
        # from the last axis on; the one that is filled up is the second
        filled.append(functional.pad(part, (*(0, 0) * (part.dim() - 2), *sides), value=fill))
    return filled

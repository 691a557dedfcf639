"""Hugging Face preprocessors, run over the columns of a slice before training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hypha.errors import DataError, ModelError
from hypha.messages import PreprocessorSpec

_PREPROCESSORS = {
    "auto": "AutoProcessor",
    "feature": "AutoFeatureExtractor",
    "image": "AutoImageProcessor",
    "tokenizer": "AutoTokenizer",
    "video": "AutoVideoProcessor",
}


class Preprocessor:
    """A Hugging Face preprocessor over the columns of a slice; it replaces those it consumes."""

    def __init__(self, spec: PreprocessorSpec, source: Path) -> None:
        import transformers

        self._spec = spec
        try:
            self._call = getattr(transformers, _PREPROCESSORS[spec.kind]).from_pretrained(source)
        except Exception as exc:
            message = f"the preprocessor cannot be loaded: {type(exc).__name__}: {exc}"
            raise ModelError(message) from exc

    def __call__(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        left = dict(columns)
        arguments: dict[str, list[object]] = {}
        for argument, column in self._spec.inputs.items():
            if column not in left:
                raise DataError(f"the preprocessor wants the column {column}, which the dataset lacks")
            arguments[argument] = _rows(argument, left.pop(column))
        options = {"padding": True, "truncation": True} if self._spec.kind == "tokenizer" else {}
        made = self._call(**arguments, **options, return_tensors="pt")
        return left | {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _rows(argument: str, column: Tensor) -> list[object]:
    """Text is kept in slices as UTF-8 bytes, padded with zeros."""
    if argument.startswith("text") and column.dtype == torch.uint8 and column.dim() == 2:
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in column]
    return [row.numpy() for row in column]

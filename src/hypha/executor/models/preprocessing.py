"""Hugging Face preprocessors, run over the columns of a slice before training; and rows of several slices in
one batch: concatenated, and padded where they are sequences of different lengths.

What a batch is depends on its rows and on the job alone, in training and in a replay alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hypha.config.tasks import IGNORED
from hypha.errors import BatchFailed, ModelError, SliceCorrupt
from hypha.messages import PreprocessorSpec

logger = logging.getLogger("hypha.executor.preprocessing")

_PREPROCESSORS = {
    "auto": "AutoProcessor",
    "feature": "AutoFeatureExtractor",
    "image": "AutoImageProcessor",
    "tokenizer": "AutoTokenizer",
    "video": "AutoVideoProcessor",
}
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


class Preprocessor:
    """A Hugging Face preprocessor over the columns of a slice; it replaces those it consumes.

    Texts of a slice are padded to the longest of them; :attr:`padding` says how rows of several slices are
    brought to one length. Texts longer than the tokenizer's model takes are cut, and that is logged once.
    """

    def __init__(self, spec: PreprocessorSpec, source: Path) -> None:
        """Raises :class:`ModelError` when it cannot be loaded, or has no token to pad with."""
        import transformers

        self._spec = spec
        try:
            # a preprocessor has no code of its own that would be run
            self._call = getattr(transformers, _PREPROCESSORS[spec.kind]).from_pretrained(
                source, trust_remote_code=False
            )
        except Exception as exc:
            message = f"the preprocessor cannot be loaded: {type(exc).__name__}: {exc}"
            raise ModelError(message) from exc
        # of a source with a tokenizer alone, AutoProcessor makes a tokenizer
        alone = hasattr(self._call, "pad_token_id")
        tokenizer: Any = self._call if alone else getattr(self._call, "tokenizer", None)
        if tokenizer is not None:
            _give_padding_token(tokenizer)
        self._tokenizer = tokenizer
        self._said_cut = False
        #: how rows of different lengths become one batch
        self.padding = padding_of(tokenizer, self._call)

    def __call__(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises :class:`BatchFailed` when the preprocessor does not take the columns."""
        left = dict(columns)
        arguments: dict[str, list[object]] = {}
        for argument, column in self._spec.inputs.items():
            if column not in left:
                raise BatchFailed(f"the preprocessor wants the column {column}, which the dataset lacks")
            arguments[argument] = _rows(argument, left.pop(column))
        try:
            made = self._tokenized(arguments) if self._tokenizer is self._call else self._processed(arguments)
        except Exception as exc:
            told = " ".join(str(exc).split())
            raise BatchFailed(
                f"the preprocessor cannot work on the columns {', '.join(self._spec.inputs.values())}: "
                f"{type(exc).__name__}: {told}; preprocessor.input_names says which column is which argument"
            ) from exc
        return left | made

    def _processed(self, arguments: dict[str, list[object]]) -> dict[str, Tensor]:
        # a processor of images and texts pads its texts, where rows would be of different lengths otherwise
        options = {"padding": True} if self._tokenizer is not None else {}
        made = self._call(**arguments, **options, return_tensors="pt")
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    def _tokenized(self, arguments: dict[str, list[object]]) -> dict[str, Tensor]:
        target = arguments.pop("text_target", None)
        made = self._encoded(arguments) if arguments else {}
        if target is not None:
            # alone, as of labels together with a text no mask is given, and padding is not to be learnt
            encoded = self._encoded({"text_target": target})
            made["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        return made

    def _encoded(self, texts: dict[str, list[object]]) -> dict[str, Tensor]:
        tokenizer = self._tokenizer
        made = tokenizer(
            **texts, padding=True, truncation=True, return_attention_mask=True, return_tensors="pt"
        )
        length = made["input_ids"].shape[1]
        if length >= tokenizer.model_max_length and not self._said_cut:
            # those that fit exactly are not told from those that were cut, which is worth no second run
            self._said_cut = True
            logger.warning(
                "Texts of more than %d tokens are cut: the tokenizer's model_max_length; change it in "
                "tokenizer_config.json, or prepare the dataset with --sequence-length.",
                length,
            )
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _give_padding_token(tokenizer: Any) -> None:
    """Padding is masked, so any token will do, and the end of a text is the usual one."""
    if tokenizer.pad_token_id is not None:
        return
    stand_in = next(
        (token for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token) if token), None
    )
    if stand_in is None:
        raise ModelError(
            "the tokenizer has no padding token, nor an end of text to stand in for it; set pad_token in its "
            "tokenizer_config.json"
        )
    logger.warning("The tokenizer has no padding token; %s stands in for it, masked.", stand_in)
    tokenizer.pad_token = stand_in


def padding_of(tokenizer: Any, processor: Any = None, config: Any = None) -> Padding:
    """What a tokenizer, another preprocessor, or else a model's configuration say about padding."""
    token = None
    for who, name in ((tokenizer, "pad_token_id"), (config, "pad_token_id"), (config, "eos_token_id")):
        token = getattr(who, name, None) if token is None else token
    token = token[0] if isinstance(token, list) and token else token
    value = getattr(processor, "padding_value", None)
    return Padding(
        token=token if isinstance(token, int) else 0,
        value=float(value) if isinstance(value, int | float) else 0.0,
        left=getattr(tokenizer or processor, "padding_side", "right") == "left",
    )


def _rows(argument: str, column: Tensor) -> list[object]:
    """Text is kept in slices as UTF-8 bytes, padded with zeros."""
    if argument.startswith("text") and column.dtype == torch.uint8 and column.dim() == 2:
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in column]
    return [row.numpy() for row in column]


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

"""Text as a source: documents through a tokenizer, one after the other, cut into equal blocks.

A sample is ``input_ids`` and ``labels``, both the same ``sequence_length`` ids (causal models shift the
labels themselves). After each document comes the tokenizer's end-of-text token, where its directory names
one. The ids left over at the end, too few for a block, are dropped and counted.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from hypha.data.columns import Block, listed, rows_a_block
from hypha.data.options import BYTES, PrepareOptions
from hypha.data.slices import Array
from hypha.data.sources.arrow_columns import plain
from hypha.data.sources.tables import Table
from hypha.errors import ConfigError, InputUnusable, Problem

#: A document longer than this is tokenized in pieces, cut after a line.
PIECE_CHARACTERS = 4 << 20
_READ_BYTES = 1 << 20

#: (text, whether it is the last of its document)
Piece = tuple[str, bool]
Encode = Callable[[str], Array]


def file_documents(files: list[Path]) -> Iterator[Piece]:
    """Each file is a document. Raises InputUnusable where a file is not UTF-8."""
    for path in files:
        yield from _pieces(path)


def _pieces(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held = ""
    position = 0
    try:
        with path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                held += decoder.decode(data)
                position += len(data)
                if len(held) >= PIECE_CHARACTERS and (cut := held.rfind("\n") + 1):
                    yield held[:cut], False
                    held = held[cut:]
            held += decoder.decode(b"", final=True)
    except UnicodeDecodeError as exc:
        raise InputUnusable(
            f"{path} is not UTF-8 text near byte {position + exc.start}: {exc.reason}"
        ) from exc
    except OSError as exc:
        raise InputUnusable(f"{path} cannot be read: {exc.strerror}") from exc
    yield held, True


def table_documents(table: Table, column: str) -> Iterator[Piece]:
    """Each row's text is a document. Raises InputUnusable when the column is not there, or no text."""
    if column not in table.names:
        raise InputUnusable(
            f"there is no column {column!r} of text; set text_column to one of {listed(table.names)}"
        )
    if column not in table.texts:
        raise InputUnusable(
            f"column {column!r} is not text; set text_column to one of {listed(sorted(table.texts))}"
        )
    return _rows(table, column)


def _rows(table: Table, column: str) -> Iterator[Piece]:
    for batch in table.batches([column]):
        for text in plain(batch.columns[column]).to_pylist():
            yield text or "", True


class Vocabulary:
    """Text to ids."""

    def __init__(self, encode: Encode, end: int | None) -> None:
        self.encode = encode
        self.end = end


def load_vocabulary(name: str) -> Vocabulary:
    """``bytes``, a ``tokenizer.json``, or a directory with one. Raises ConfigError."""
    if name == BYTES:
        return Vocabulary(lambda text: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64), None)
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            [
                Problem(
                    key="tokenizer",
                    message=f"{file} does not exist; name a directory with a tokenizer.json, that file, or "
                    f"{BYTES!r}",
                )
            ]
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # the library raises bare Exception
        raise ConfigError([Problem(key="tokenizer", message=f"{file} is no tokenizer: {exc}")]) from exc

    def encode(text: str) -> Array:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    end = _end_token(file.parent / "tokenizer_config.json")
    return Vocabulary(encode, tokenizer.token_to_id(end) if end is not None else None)


class _Named(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    eos_token: str | _Named | None = None


def _end_token(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        token = msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig).eos_token
    except msgspec.MsgspecError as exc:
        raise ConfigError([Problem(key="tokenizer", message=f"{path} cannot be read: {exc}")]) from exc
    return token.content if isinstance(token, _Named) else token


class TextSource:
    """See the module."""

    labels: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, pieces: Iterator[Piece], options: PrepareOptions) -> None:
        if options.tokenizer is None:
            message = f"text needs one: a directory with a tokenizer.json, or {BYTES!r}"
            raise ConfigError([Problem(key="tokenizer", message=message)])
        self.notes: list[str] = []
        self._pieces = pieces
        self._length = options.sequence_length
        self._vocabulary = load_vocabulary(options.tokenizer)

    def blocks(self) -> Iterator[Block]:
        length = self._length
        step = rows_a_block(length * 16) * length
        held: list[Array] = []
        count = start = 0
        for ids in self._ids():
            held.append(ids)
            count += len(ids)
            if count >= step:
                joined = np.concatenate(held)
                whole = count // length
                yield self._block(joined[: whole * length], start)
                start += whole
                held = [joined[whole * length :]]
                count -= whole * length
        if whole := count // length:
            yield self._block(np.concatenate(held)[: whole * length], start)
            start += whole
            count -= whole * length
        if not start:
            raise InputUnusable(
                f"the text makes {count} tokens, fewer than one sequence of {length}; give more text, or a "
                "smaller "
                "sequence_length"
            )
        if count:
            self.notes.append(f"{count} tokens at the end, too few for a sequence, were dropped")

    def _ids(self) -> Iterator[Array]:
        end = self._vocabulary.end
        empty = True
        for text, last in self._pieces:
            if text:
                empty = False
                yield self._vocabulary.encode(text)
            if last:
                if end is not None and not empty:
                    yield np.array([end], dtype=np.int64)
                empty = True

    def _block(self, ids: Array, start: int) -> Block:
        rows = ids.reshape(-1, self._length)
        return Block("the text", start, {"input_ids": rows, "labels": rows})

"""Text as a source: documents through a tokenizer, one after the other, cut into equal blocks.

A sample is ``input_ids`` and ``labels``, both the same ``sequence_length`` ids (causal models shift the
labels themselves). After each document comes the tokenizer's end-of-text token, where its directory names
one. The ids left over at the end, too few for a block, are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from hypha.data.columns import Block, listed, rows_a_block, rows_from
from hypha.data.options import BYTES, PrepareOptions
from hypha.data.slices import Array
from hypha.data.sources.reading import open_text
from hypha.data.sources.tables.tables import NAMED_ROWS, Table
from hypha.decoding import decode_json
from hypha.errors import ConfigError, InputUnusable, Problem, Undecodable

#: A document longer than this is tokenized in pieces, cut after a line.
PIECE_CHARACTERS = 4 << 20
_READ_CHARACTERS = 1 << 20

#: (text, whether it is the last of its document)
Piece = tuple[str, bool]


class FileDocuments:
    """Each file is a document. ``notes`` are complete after the last of ``pieces``, of these documents as of
    those of a table.
    """

    def __init__(self, files: list[Path], encoding: str | None) -> None:
        self._files = files
        self._encoding = encoding
        self._empty: list[str] = []

    @property
    def notes(self) -> list[str]:
        named = listed(self._empty[:NAMED_ROWS])
        return [f"{len(self._empty)} files are empty ({named})"] if self._empty else []

    def pieces(self) -> Iterator[Piece]:
        for path in self._files:
            held = ""
            empty = True
            with open_text(path, self._encoding) as file:
                while more := file.read(_READ_CHARACTERS):
                    empty = False
                    held += more
                    if len(held) >= PIECE_CHARACTERS and (cut := held.rfind("\n") + 1):
                        yield held[:cut], False
                        held = held[cut:]
            if empty:
                self._empty.append(path.name)
            yield held, True


class TableDocuments:
    """Each row's text is a document. Raises InputUnusable when the column is not there, or no text."""

    def __init__(self, table: Table, options: PrepareOptions) -> None:
        self._table = table
        self._own_notes: list[str] = []
        self._empty = 0
        self._named: list[str] = []
        self._column = self._found(options.text_column)
        if others := [name for name in table.names if name != self._column]:
            self._own_notes.append(
                f"text of column {self._column!r} is cut into sequences; the columns {listed(others)} are "
                "left out"
            )

    def _found(self, column: str) -> str:
        texts = sorted(self._table.texts)
        if column in texts:
            return column
        choice = f"give --text-column, one of {listed(texts)}" if texts else "it has no text"
        if column in self._table.names:
            raise InputUnusable(f"column {column!r} is not text; {choice}")
        if column != PrepareOptions.text_column or len(texts) != 1:
            raise InputUnusable(
                f"there is no column {column!r} of text among {listed(self._table.names)}; {choice}"
            )
        self._own_notes.append(
            f"the only column of text is {texts[0]!r}, which is taken; --text-column names another"
        )
        return texts[0]

    @property
    def notes(self) -> list[str]:
        notes = [*self._table.notes, *self._own_notes]
        if self._empty:
            notes.append(f"{self._empty} rows have no text and are left out ({'; '.join(self._named)})")
        return notes

    def pieces(self) -> Iterator[Piece]:
        for batch in self._table.batches([self._column]):
            for index, text in enumerate(batch.columns[self._column].to_pylist()):
                if not text:
                    self._empty += 1
                    if len(self._named) < NAMED_ROWS:
                        self._named.append(batch.row(index))
                yield text or "", True


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids; ``end`` stands after each document. ``notes`` say what of the tokenizer's settings is not
    used.
    """

    encode: Callable[[str], Array]
    end: int | None
    notes: tuple[str, ...] = ()


def load_vocabulary(name: str) -> Vocabulary:
    """``bytes``, a ``tokenizer.json``, or a directory with one. Raises ConfigError."""
    if name == BYTES:
        return Vocabulary(lambda text: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64), None)
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        message = f"{file} does not exist; name a directory with a tokenizer.json, that file, or {BYTES!r}"
        raise ConfigError([Problem("tokenizer", message, "--tokenizer")])
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as exc:  # the library raises bare Exception
        raise ConfigError([Problem("tokenizer", f"{file} is no tokenizer: {exc}", "--tokenizer")]) from exc
    notes = []
    # they are for single texts; a document is cut into sequences, and nothing of it may be lost
    if (truncation := tokenizer.truncation) is not None:
        tokenizer.no_truncation()
        notes.append(
            f"{file} cuts texts after {truncation['max_length']} ids; that is turned off, --sequence-length "
            "says how long sequences are"
        )
    if tokenizer.padding is not None:
        tokenizer.no_padding()
        notes.append(f"{file} pads texts; that is turned off, as sequences are filled with text")

    def encode(text: str) -> Array:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    end = _end_token(file.parent / "tokenizer_config.json")
    found = tokenizer.token_to_id(end) if end is not None else None
    if end is not None and found is None:
        notes.append(f"{file} does not know its end-of-text token {end!r}; none stands between documents")
    return Vocabulary(encode, found, tuple(notes))


class _Named(msgspec.Struct):
    content: str


class _TokenizerConfig(msgspec.Struct):
    eos_token: str | _Named | None = None


def _end_token(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        token = decode_json(path.read_bytes(), _TokenizerConfig).eos_token
    except Undecodable as exc:
        raise ConfigError([Problem("tokenizer", f"{path} cannot be read: {exc}", "--tokenizer")]) from exc
    return token.content if isinstance(token, _Named) else token


class TextSource:
    labels: Mapping[str, tuple[str, ...]] = {}

    def __init__(self, documents: FileDocuments | TableDocuments, options: PrepareOptions) -> None:
        if options.tokenizer is None:
            message = f"text needs one: --tokenizer with a directory with a tokenizer.json, or {BYTES!r}"
            raise ConfigError([Problem("tokenizer", message)])
        self._documents = documents
        self._length = options.sequence_length
        self._vocabulary = load_vocabulary(options.tokenizer)
        self._left = 0

    @property
    def notes(self) -> list[str]:
        notes = [*self._documents.notes, *self._vocabulary.notes]
        if self._left:
            notes.append(f"{self._left} tokens at the end, too few for a sequence, were dropped")
        return notes

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
                "smaller --sequence-length"
            )
        self._left = count

    def _ids(self) -> Iterator[Array]:
        end = self._vocabulary.end
        empty = True
        for text, last in self._documents.pieces():
            if text:
                empty = False
                yield self._vocabulary.encode(text)
            if last:
                if end is not None and not empty:
                    yield np.array([end], dtype=np.int64)
                empty = True

    def _block(self, ids: Array, start: int) -> Block:
        rows = ids.reshape(-1, self._length)
        return Block(rows_from("the text", start), {"input_ids": rows, "labels": rows})

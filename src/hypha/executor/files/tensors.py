"""Files of theta, momentum and updates: canonical safetensors, written, read and hashed in one pass.

The format is safetensors; what this module adds to that library is what a 10 GB model needs: files are
produced and consumed in chunks of about a megabyte that stay in the processor's cache (read, decode, add;
or subtract, write, hash), so no whole copy of a tensor is ever made and nothing is mapped into memory.
Files are canonical: equal values give equal bytes, and with them equal BLAKE3 hashes. The order of tensors
is by size of their element, largest first, then by name, as that library itself writes them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blake3
import msgspec
import torch
import xxhash
from torch import Tensor

from hypha.decoding import decode
from hypha.errors import DataError, Undecodable
from hypha.executor.files.reused import ReusedFiles
from hypha.files.staging import StagedFile

#: Elements handled at a time: 1 MiB of fp32, which stays in the second-level cache.
CHUNK = 1 << 18
_MAX_HEADER_BYTES = 100 << 20

#: Of a column or a tensor, by its name in safetensors.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
#: and its name, by the type
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on the calling thread alone (also a decorator).

    This module's work is bound by memory and cut into chunks of some ten microseconds. Handing such chunks
    to OpenMP's threads gains little on an idle machine, and on a busy one, where every hand-over waits for
    the operating system, makes a synchronisation twenty times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Spec:
    """What a tensor looks like."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, self.dtype)}{list(self.shape)}"

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(value.dtype, tuple(value.shape)) for name, value in tensors.items()}


# --- hashing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digests:
    """Of a file, in hex: BLAKE3 (empty where nobody needs it) and XXH3 of 128 bits."""

    blake3: str
    xxh3: str


class Hasher:
    """Hashes of what is given in order; ``quick``: XXH3 alone. ``beside``: in a thread of its own, so what is
    given must stay as it is until ``digests`` returns.
    """

    def __init__(self, quick: bool = False, beside: bool = False) -> None:
        self._strong = None if quick else blake3.blake3()
        self._quick = xxhash.xxh3_128()
        self._all = [one for one in (self._quick, self._strong) if one is not None]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash") if beside else None

    def update(self, data: bytes | memoryview) -> None:
        for one in self._all:
            if self._thread is not None:
                self._thread.submit(one.update, data)
            else:
                one.update(data)

    def digests(self) -> Digests:
        """Of all of it; the last call."""
        if self._thread is not None:
            self._thread.shutdown()
        return Digests("" if self._strong is None else self._strong.hexdigest(), self._quick.hexdigest())


# --- writing ------------------------------------------------------------------------------------------


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    reused: ReusedFiles | None = None,
    beside: bool = False,
) -> Digests:
    """Write ``tensors`` (on any device) to ``path`` and return the hashes of the file.

    It may be written over one of ``reused``. ``beside``: another thread does the hashing.
    """
    hasher = Hasher(beside=beside)
    write_pieces(path, specs_of(tensors), lambda name: pieces(tensors[name]), {}, hasher, reused)
    return hasher.digests()


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor on any device, in chunks on the CPU."""
    flat = tensor.detach().to("cpu").resolve_conj().resolve_neg().reshape(-1)
    for at in range(0, flat.numel(), CHUNK):
        yield flat[at : at + CHUNK]


def _bytes(piece: Tensor) -> memoryview:
    # numpy has no bfloat16, but any contiguous tensor can be seen as bytes
    return memoryview(piece.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _ordered(specs: Mapping[str, Spec]) -> list[str]:
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    at = 0
    for name in _ordered(specs):
        spec = specs[name]
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (at, at + spec.size_bytes),
        }
        at += spec.size_bytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_pieces(
    path: Path,
    specs: Mapping[str, Spec],
    source: Callable[[str], Iterator[Tensor]],
    metadata: Mapping[str, str],
    hasher: Hasher,
    reused: ReusedFiles | None = None,
) -> None:
    """Write what ``source`` yields for each name, in the order of the file, and give it to ``hasher``.

    The file appears whole or not at all. With a ``hasher`` that works at once, a piece may be gone when the
    next one is asked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    over = None if reused is None else reused.take
    with StagedFile(path, mode=0o600, over=over) as staged:
        header = _header(specs, metadata)
        staged.file.write(header)
        hasher.update(header)
        for name in _ordered(specs):
            for piece in source(name):
                view = _bytes(piece)
                staged.file.write(view)
                hasher.update(view)
        staged.publish()


# --- reading ------------------------------------------------------------------------------------------


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class TensorFile:
    """An open safetensors file, checked: every tensor lies inside, none overlaps, no byte is unaccounted for.
    ``specs`` are in the order of the file.

    Raises :class:`DataError` for anything else. A context manager that closes the file.
    """

    def __init__(self, path: Path, most_header_bytes: int = _MAX_HEADER_BYTES) -> None:
        self.path = path
        self._most_header_bytes = most_header_bytes
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._parse()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _bad(self, why: str) -> DataError:
        return DataError(f"{self.path.name} is no valid safetensors file: {why}")

    def _parse(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self._most_header_bytes, size - 8):
            raise self._bad(f"its header would take {length} of {size} bytes")
        text = self._file.read(length)
        try:
            self.metadata, entries = decode(_described, text)
        except Undecodable as exc:
            raise self._bad(str(exc)) from exc
        self.header = prefix + text
        self.specs: dict[str, Spec] = {}
        #: of each the first byte in the file
        self._starts: dict[str, int] = {}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
            dtype = DTYPES.get(entry.dtype)
            if dtype is None:
                raise self._bad(f"{name} has the dtype {entry.dtype}")
            spec = Spec(dtype, entry.shape)
            if min(entry.shape, default=0) < 0 or entry.data_offsets != (at, at + spec.size_bytes):
                raise self._bad(f"{name} claims bytes that are not its own")
            self.specs[name], self._starts[name] = spec, 8 + length + at
            at += spec.size_bytes
        if 8 + length + at != size:
            raise self._bad(f"it has {size} bytes where its header says {8 + length + at}")

    def read_chunk(self, name: str, at: int, buffer: Tensor) -> Tensor:
        """The elements from ``at`` on, at most as many as fit into ``buffer``, in it. From any thread."""
        spec = self.specs[name]
        piece = buffer[: min(buffer.numel(), math.prod(spec.shape) - at)]
        self._fill(piece, self._starts[name] + at * spec.dtype.itemsize)
        return piece

    def read_into(
        self, name: str, out: Tensor, hasher: Hasher | None = None, copy: Tensor | None = None
    ) -> None:
        """Fill the contiguous CPU tensor ``out``; add its bytes to ``hasher``, and copy them to the like
        tensor ``copy``, while they are hot.
        """
        flat = out.view(-1)
        other = None if copy is None else copy.view(-1)
        start = self._starts[name]
        for at in range(0, flat.numel(), CHUNK):
            piece = flat[at : at + CHUNK]
            self._fill(piece, start + at * out.dtype.itemsize)
            if hasher is not None:
                hasher.update(_bytes(piece))
            if other is not None:
                other[at : at + CHUNK].copy_(piece)

    def _fill(self, piece: Tensor, position: int) -> None:
        view = _bytes(piece)
        while view:
            count = os.preadv(self._file.fileno(), [view], position)
            if count == 0:
                raise self._bad("it ends before its last tensor does")
            view = view[count:]
            position += count


@one_thread()
@torch.no_grad()
def read(
    path: Path,
    into: Mapping[str, Tensor],
    copies: Mapping[str, Tensor] | None = None,
    quick: bool = False,
) -> Digests:
    """Fill ``into`` (contiguous, on the CPU) from the file, which must hold exactly these names, shapes and
    dtypes, and return the hashes of the file, with ``quick`` without BLAKE3. After an error ``into`` may hold
    a mixture.

    ``copies``, of the same names and shapes on any device, are set to the same values.
    """
    with TensorFile(path) as file:
        if problem := difference(file.specs, specs_of(into)):
            raise DataError(f"{path.name} does not fit the model: {problem}")
        hasher = Hasher(quick)
        hasher.update(file.header)
        for name in file.specs:
            copy = None if copies is None else copies[name]
            at_once = copy is not None and copy.device.type == "cpu" and copy.is_contiguous()
            file.read_into(name, into[name], hasher, copy if at_once else None)
            if copy is not None and not at_once:
                copy.copy_(into[name])
        return hasher.digests()


def _described(text: bytes) -> tuple[dict[str, str], dict[str, _HeaderEntry]]:
    """Metadata, and what is said of each tensor."""
    raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    metadata = raw.pop("__metadata__", None)
    entries = {name: msgspec.json.decode(part, type=_HeaderEntry) for name, part in raw.items()}
    return {} if metadata is None else msgspec.json.decode(metadata, type=dict[str, str]), entries


def difference(found: Mapping[str, Spec], expected: Mapping[str, Spec]) -> str | None:
    """The first difference between two sets of tensors in words, or None."""
    if missing := sorted(expected.keys() - found.keys()):
        return f"it lacks {missing[0]}"
    if surplus := sorted(found.keys() - expected.keys()):
        return f"it holds {surplus[0]}, which the model lacks"
    for name, spec in expected.items():
        if found[name] != spec:
            other = found[name]
            return f"{name} is {other} where the model has {spec}"
    return None

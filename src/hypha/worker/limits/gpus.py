"""Which GPUs this machine has: how many, of what memory and model, and how an executor is shown some of them.

NVIDIA's are read by their driver's library (``nvidia-ml-py``), else from ``/proc/driver/nvidia``, which does
not report their memory; AMD's from the topology that ROCm's kernel driver shows in sysfs; Apple's share the
machine's memory. A GPU that the environment of this process hides is not there.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypha.telemetry.resources import GpuReading, read_gpus

Vendor = Literal["nvidia", "amd", "apple"]

#: the variable by which a process is shown some GPUs, by their numbers or identifiers; Apple has none
VISIBLE: dict[Vendor, str] = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "ROCR_VISIBLE_DEVICES"}
#: ROCm's libraries count again among what the one above leaves, so these must not be inherited beside it
SECOND_FILTERS = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
#: of the machine's memory, what Metal recommends that a GPU of Apple's uses at most
_APPLE_SHARE = 0.75
#: kinds of memory banks in ROCm's topology that are on the device itself (HSA_MEM_HEAP_TYPE_FB_*)
_ON_DEVICE = ("1", "2")


@dataclass(frozen=True)
class Gpu:
    """``name`` is what the vendor's variable calls it; ``memory_bytes`` is 0 where nobody reports it."""

    vendor: Vendor
    name: str
    model: str
    memory_bytes: int
    #: who reported it
    source: str
    identifier: str = ""

    def __str__(self) -> str:
        memory = f"{self.memory_bytes / 1e9:.1f} GB" if self.memory_bytes else "memory unknown"
        return f"{self.model} ({memory})"


def find_gpus(
    environment: Mapping[str, str],
    root: Path = Path("/"),
    memory_bytes: float = 0.0,
    read: Callable[[], Sequence[GpuReading]] = read_gpus,
) -> tuple[Gpu, ...]:
    """Those of the first vendor that has any, since an executor uses one framework. The kernel
    describes itself below ``root``, ``memory_bytes`` is the machine's, ``read`` asks NVIDIA's library. Blocks
    for some milliseconds.
    """
    nvidia = [
        Gpu("nvidia", one.index, one.model or "NVIDIA GPU", one.total_bytes, "nvidia-ml-py", one.identifier)
        for one in read()
    ] or list(_of_nvidia_proc(root / "proc" / "driver" / "nvidia" / "gpus"))
    if nvidia:
        return _visible(nvidia, environment)
    amd = list(_of_rocm(root / "sys" / "class" / "kfd" / "kfd" / "topology" / "nodes"))
    if amd:
        return _visible(amd, environment)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        # reached through torch's MPS backend; there is one, and it cannot be hidden
        return (Gpu("apple", "0", "Apple GPU", int(_APPLE_SHARE * memory_bytes), "Metal (MPS)"),)
    return ()


def _of_nvidia_proc(directory: Path) -> Iterator[Gpu]:
    """By their addresses on the bus, the order that ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` numbers them in."""
    for index, place in enumerate(_listed(directory)):
        found = _pairs(place / "information", ":")
        model, identifier = found.get("Model", "NVIDIA GPU"), found.get("GPU UUID", "")
        yield Gpu("nvidia", str(index), model, 0, "/proc/driver/nvidia", identifier)


def _of_rocm(directory: Path) -> Iterator[Gpu]:
    """A node of the topology without SIMD units is a processor."""
    index = 0
    for node in sorted(_listed(directory), key=lambda path: int(path.name) if path.name.isdigit() else 0):
        about = _pairs(node / "properties", " ")
        if about.get("simd_count", "0") == "0":
            continue
        banks = [_pairs(bank / "properties", " ") for bank in _listed(node / "mem_banks")]
        held = 0
        for bank in banks:
            if bank.get("heap_type") in _ON_DEVICE:
                with contextlib.suppress(ValueError):
                    held += int(bank.get("size_in_bytes", "0"))
        model = _text(node / "name") or f"AMD GPU (gfx {about.get('gfx_target_version', '?')})"
        yield Gpu("amd", str(index), model, held, "ROCm's kernel driver", _rocm_identifier(about))
        index += 1


def _rocm_identifier(about: Mapping[str, str]) -> str:
    with contextlib.suppress(ValueError):
        number = int(about.get("unique_id", "0"))
        return f"GPU-{number:016x}" if number else ""
    return ""


def _visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those that the vendor's variable names, under the names that it uses; all without it. What it names
    and nobody has read (a part of a GPU, ``MIG-...``) is there, with a memory that is not known.
    """
    first = gpus[0]
    named = environment.get(VISIBLE[first.vendor])
    if named is None:
        return tuple(gpus)
    found = []
    for name in (part.strip() for part in named.split(",")):
        if not name:
            continue
        known = next((gpu for gpu in gpus if _is_named(gpu, name)), None)
        if known is None and (name.isdigit() or name.startswith("-")):
            break  # as the drivers do: what follows a number that does not exist is hidden too
        model, memory = (known.model, known.memory_bytes) if known is not None else (name, 0)
        source = known.source if known is not None else VISIBLE[first.vendor]
        found.append(Gpu(first.vendor, name, model, memory, source, known.identifier if known else name))
    return tuple(found)


def _is_named(gpu: Gpu, name: str) -> bool:
    """By its number, or by the beginning of its identifier."""
    return name == gpu.name or (len(name) > 4 and gpu.identifier.startswith(name))


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _pairs(path: Path, separator: str) -> dict[str, str]:
    """Lines of ``name<separator>value``; none where the file cannot be read."""
    found = {}
    for line in _text(path).splitlines():
        name, divided, value = line.strip().partition(separator)
        if divided:
            found[name.strip()] = value.strip()
    return found

"""Which GPUs this machine has, which of them a lease has, and how its executor is shown those and no others.

NVIDIA's are read by their driver's library (``nvidia-ml-py``), else from ``/proc/driver/nvidia``, which does
not report their memory; AMD's from the topology that ROCm's kernel driver shows in sysfs; Apple's share the
machine's memory. A GPU that the environment of this process hides is not there.

:class:`GpuBoard` is arithmetic on the memory of each GPU. A lease gets one GPU where one has that much left:
an executor cannot add up what is left of two. More than any single GPU has is taken of several that nobody
uses. What fits nowhere is not offered, although the worker as a whole may have as much.
"""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hypha.rules.resources import TOLERANCE
from hypha.telemetry.resources import GpuReading, read_gpus

GB = 10**9

Vendor = Literal["nvidia", "amd", "apple"]

#: the variable by which a process is shown some GPUs, by their numbers or identifiers; Apple has none
VISIBLE: dict[Vendor, str] = {"nvidia": "CUDA_VISIBLE_DEVICES", "amd": "ROCR_VISIBLE_DEVICES"}
#: ROCm's libraries count again among what the one above leaves, so these must not be inherited beside it
SECOND_FILTERS = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
#: the bytes of each of its GPUs that an executor may use; read by Hypha's own
#: (hypha.executor.inner.local_model)
MEMORY_VARIABLE = "HYPHA_GPU_MEMORY_BYTES"
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
        unique = about.get("unique_id", "")
        identifier = f"GPU-{int(unique):016x}" if unique.isdecimal() and int(unique) else ""
        yield Gpu("amd", str(index), model, held, "ROCm's kernel driver", identifier)
        index += 1


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
        # by its number, or by the beginning of its identifier
        known = next(
            (one for one in gpus if name == one.name or (len(name) > 4 and one.identifier.startswith(name))),
            None,
        )
        if known is None and (name.isdigit() or name.startswith("-")):
            break  # as the drivers do: what follows a number that does not exist is hidden too
        model, memory = (known.model, known.memory_bytes) if known is not None else (name, 0)
        source = known.source if known is not None else VISIBLE[first.vendor]
        found.append(Gpu(first.vendor, name, model, memory, source, known.identifier if known else name))
    return tuple(found)


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


@dataclass(frozen=True)
class GpuShare:
    """What one lease has: the ``numbers`` of its GPUs, in order, and ``gb`` of each of them."""

    numbers: tuple[int, ...] = ()
    gb: float = 0.0


class GpuBoard:
    """``gpus_gb`` is the memory of each GPU. Without any nothing is placed, and everything fits: then only
    the sum counts, as for cores.
    """

    def __init__(self, gpus_gb: Sequence[float]) -> None:
        self._gpus = tuple(gpus_gb)
        #: lease -> GPU -> GB of it
        self._placed: dict[str, dict[int, float]] = {}

    def keep_only(self, leases: Iterable[str]) -> None:
        """These leases hold what they were given, all others nothing any more."""
        living = frozenset(leases)
        for lease_id in [one for one in self._placed if one not in living]:
            del self._placed[lease_id]

    def share_of(self, lease_id: str) -> GpuShare:
        parts = self._placed.get(lease_id, {})
        return GpuShare(tuple(sorted(parts)), min(parts.values(), default=0.0))

    def fits(self, gpu_gb: float) -> bool:
        return gpu_gb <= 0 or not self._gpus or self._place(gpu_gb) is not None

    def largest(self, most_gb: float) -> float:
        """The most, and no more than ``most_gb``, that one lease can be given now."""
        if not self._gpus:
            return most_gb
        free = self._free()
        idle = min(most_gb, sum(left for number, left in enumerate(free) if not self._users(number)))
        # several are for what no single one of them could hold
        return idle if idle > max(self._gpus) + TOLERANCE else min(most_gb, max(free))

    def place(self, lease_id: str, gpu_gb: float) -> None:
        """Give ``lease_id`` what it is to have. Whoever has asked :meth:`fits` before gets it."""
        self._placed[lease_id] = (self._place(gpu_gb) or {}) if gpu_gb > 0 else {}

    def _place(self, gpu_gb: float) -> dict[int, float] | None:
        free = self._free()
        able = [number for number, left in enumerate(free) if gpu_gb <= left + TOLERANCE]
        if able:
            # one that nobody uses before one that is shared; of those the one that is filled best
            chosen = min(able, key=lambda number: (self._users(number), free[number], number))
            return {chosen: gpu_gb}
        if gpu_gb <= max(self._gpus, default=0.0) + TOLERANCE:
            return None
        idle = sorted(
            (number for number in range(len(free)) if not self._users(number)),
            key=lambda number: (-free[number], number),
        )
        for count in range(2, len(idle) + 1):
            some = idle[:count]
            # each has the same share, as each does the same work
            if gpu_gb <= count * min(free[number] for number in some) + TOLERANCE:
                return dict.fromkeys(some, gpu_gb / count)
        # unequal ones: all of each, as far as is needed
        if gpu_gb <= sum(free[number] for number in idle) + TOLERANCE:
            return {number: free[number] for number in idle}
        return None

    def _free(self) -> list[float]:
        used = [0.0] * len(self._gpus)
        for parts in self._placed.values():
            for number, amount in parts.items():
                used[number] += amount
        return [max(0.0, there - taken) for there, taken in zip(self._gpus, used, strict=True)]

    def _users(self, number: int) -> int:
        return sum(number in parts for parts in self._placed.values())


def memory_of_each(gpus: Sequence[Gpu], offered_gb: float) -> tuple[float, ...]:
    """GB of each; those that their driver does not report share equally what else the configuration has."""
    known = [one.memory_bytes / GB for one in gpus]
    unknown = known.count(0.0)
    share = max(0.0, offered_gb - sum(known)) / unknown if unknown else 0.0
    return tuple(amount or share for amount in known)


def gpu_environment(
    gpus: Sequence[Gpu], share: GpuShare, inherited: Mapping[str, str], capped: bool
) -> dict[str, str]:
    """What an executor that has ``share`` of this worker's ``gpus`` gets of ``inherited``, and is told;
    ``capped``: its framework is to hold it to the memory of its share. Without any GPU it sees none. It
    inherits an order of devices that the owner has chosen, but neither the worker's own GPUs nor second
    filters.
    """
    if not gpus:
        return dict(inherited)
    second = SECOND_FILTERS if gpus[0].vendor == "amd" else ()
    hidden = (*VISIBLE.values(), *second, MEMORY_VARIABLE)
    found = {name: value for name, value in inherited.items() if name not in hidden}
    if (variable := VISIBLE.get(gpus[0].vendor)) is not None:
        names = [gpus[number].name for number in share.numbers]
        found[variable] = ",".join(names)
        if variable == "CUDA_VISIBLE_DEVICES" and any(name.isdigit() for name in names):
            # the order in which they were numbered; CUDA's own would be by speed
            found.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if capped and share.gb > 0:
        found[MEMORY_VARIABLE] = str(int(share.gb * GB))
    return found


def sees_no_gpu(environment: Mapping[str, str]) -> bool:
    """Whether an executor with that environment was given none on a machine that has some."""
    return any(environment.get(name) == "" for name in VISIBLE.values())

"""Which GPUs a lease has, and how its executor is shown those and no others.

:class:`GpuBoard` is arithmetic on the memory of each GPU. A lease gets one GPU where one has that much left:
an executor cannot add up what is left of two. More than any single GPU has is taken of several that nobody
uses. What fits nowhere is not offered, although the worker as a whole may have as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hypha.rules.resources import TOLERANCE
from hypha.worker.limits.gpus import SECOND_FILTERS, VISIBLE, Gpu

GB = 10**9
#: the bytes of each of its GPUs that an executor may use; read by Hypha's own
#: (hypha.executor.inner.device_memory)
MEMORY_VARIABLE = "HYPHA_GPU_MEMORY_BYTES"


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
        """What the lease has."""
        parts = self._placed.get(lease_id, {})
        return GpuShare(tuple(sorted(parts)), min(parts.values(), default=0.0))

    def fits(self, gpu_gb: float) -> bool:
        """Whether a lease of so much can be placed now."""
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
    """GB of each; those that their driver does not report share equally what the configuration offers beside
    the others.
    """
    known = [one.memory_bytes / GB for one in gpus]
    unknown = known.count(0.0)
    share = max(0.0, offered_gb - sum(known)) / unknown if unknown else 0.0
    return tuple(amount or share for amount in known)


@dataclass(frozen=True)
class Visibility:
    """How this worker's ``gpus`` are shown to an executor."""

    gpus: tuple[Gpu, ...] = ()

    def environment(self, share: GpuShare, capped: bool) -> dict[str, str]:
        """For an executor that has ``share``; ``capped``: its framework is to hold it to the memory of that.
        Without any GPU it sees none.
        """
        if not self.gpus:
            return {}
        found: dict[str, str] = {}
        if (name := VISIBLE.get(self.gpus[0].vendor)) is not None:
            found[name] = ",".join(self.gpus[number].name for number in share.numbers)
            if name == "CUDA_VISIBLE_DEVICES" and any(
                self.gpus[number].name.isdigit() for number in share.numbers
            ):
                # the order in which they were numbered; CUDA's own would be by speed
                found["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        if capped and share.gb > 0:
            found[MEMORY_VARIABLE] = str(int(share.gb * GB))
        return found

    def hidden(self) -> frozenset[str]:
        """Variables that an executor must not inherit: what it gets of its own, and second filters. An order
        of devices that the owner has chosen is inherited.
        """
        if not self.gpus:
            return frozenset()
        second = SECOND_FILTERS if self.gpus[0].vendor == "amd" else ()
        return frozenset((*VISIBLE.values(), *second, MEMORY_VARIABLE))


def sees_no_gpu(environment: Mapping[str, str]) -> bool:
    """Whether an executor with that environment was given none on a machine that has some."""
    return any(environment.get(name) == "" for name in VISIBLE.values())

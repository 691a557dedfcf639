"""Holding this executor to the GPU memory of its lease, by torch's own allocator.

Nothing else does on a machine whose GPUs are shared: an executor that allocates more gets torch's
``OutOfMemoryError``, as it would on a GPU of that size, and its neighbours keep theirs. The worker says how
much by ``HYPHA_GPU_MEMORY_BYTES``, of each GPU that it shows. What CUDA itself needs (its context, some
hundred MB) is not in torch's count.
"""

from __future__ import annotations

import logging

import torch

from hypha.config.environment import variable
from hypha.errors import ModelError

logger = logging.getLogger("hypha.executor")

VARIABLE = "HYPHA_GPU_MEMORY_BYTES"


def bytes_allowed(text: str | None) -> int:
    """Of the variable; 0: as much as there is. Raises :class:`ModelError` for what is no amount."""
    if not text:
        return 0
    if not text.isdigit():
        raise ModelError(f"{VARIABLE} is a number of bytes, not {text!r}; mend the executor's env")
    return int(text)


def share_of(allowed: int, there: int) -> float:
    """Which share of a GPU with ``there`` bytes may be used; 1: all of it."""
    return min(1.0, allowed / there) if allowed > 0 and there > 0 else 1.0


def cap_memory(device: torch.device) -> None:
    """From now on torch allocates no more on ``device`` than the worker allows. A CPU is none of its
    business: there the worker bounds the process itself.
    """
    if device.type not in ("cuda", "mps") or not (allowed := bytes_allowed(variable(VARIABLE))):
        return
    if device.type == "cuda":
        # also of ROCm, whose devices torch calls so
        index = torch.cuda.current_device() if device.index is None else device.index
        there = int(torch.cuda.get_device_properties(index).total_memory)
        torch.cuda.set_per_process_memory_fraction(share_of(allowed, there), index)
    else:
        there = int(torch.mps.recommended_max_memory())
        torch.mps.set_per_process_memory_fraction(share_of(allowed, there))
    logger.info("GPU memory: %.1f of %.1f GB may be used.", min(allowed, there) / 1e9, there / 1e9)

"""Which GPU an executor sees: the ones its lease pays for, none when it reserved none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def list_gpus(environment: Mapping[str, str], proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """NVIDIA devices this worker may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if _VISIBLE in environment:
        return [name for part in environment[_VISIBLE].split(",") if (name := part.strip())]
    try:
        return [str(index) for index, _ in enumerate(proc.iterdir())]
    except OSError:
        return []


class GpuPins:
    """Hands out one device an executor, the one with the fewest executors first."""

    def __init__(self, devices: list[str]) -> None:
        self._users = dict.fromkeys(devices, 0)

    def pin(self, gpu_gb: float) -> dict[str, str]:
        """Environment for an executor whose lease reserves ``gpu_gb``; give it to :meth:`release`."""
        if not self._users:
            return {}
        if gpu_gb <= 0:
            return {_VISIBLE: ""}
        device = min(self._users, key=lambda name: self._users[name])
        self._users[device] += 1
        return {_VISIBLE: device}

    def release(self, pinned: Mapping[str, str]) -> None:
        """The executor with this environment has ended."""
        device = pinned.get(_VISIBLE)
        if device:
            self._users[device] -= 1

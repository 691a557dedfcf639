"""Damage to a node's files: bytes that rot, a disk that is full; and how each is undone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from hypha.cli.local.network import Network, NetworkFailed

_ROTTEN_BYTES = 64
_FILLER = "filler"
_CHUNK = bytes(1 << 16)


def corrupt(network: Network, role: str, name: str) -> Callable[[], None]:
    """Turn the bits of some bytes in the middle of a file of node ``name``; its size and times stay, as when
    a disk rots. A data node's first slice, a worker's cached slice that no job uses at the moment (else any),
    or the newest checkpoint, for the scheduler and the parameter server. Returns what turns them back.
    """
    path = _victim(network, role, name)
    before = path.stat()
    at = before.st_size // 2

    def turn() -> None:
        try:
            now = path.stat()
        except FileNotFoundError:
            return
        if (now.st_ino, now.st_size) != (before.st_ino, before.st_size):
            return  # somebody has replaced it meanwhile
        os.chmod(path, 0o600)
        with path.open("r+b") as file:
            file.seek(at)
            rotten = bytes(byte ^ 0xFF for byte in file.read(_ROTTEN_BYTES))
            file.seek(at)
            file.write(rotten)
        os.chmod(path, before.st_mode)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    turn()
    return turn


def _victim(network: Network, role: str, name: str) -> Path:
    config = network.config(name)
    if role == "data":
        found = sorted(Path(config["datasets"][0]["path"]).glob("slice-*.safetensors"))[:1]
    elif role == "worker":
        cached = (Path(config["work_dir"]) / "cache").glob("*.safetensors")
        found = sorted(cached, key=lambda path: (path.stat().st_nlink, path.name))[:1]
    elif role in ("scheduler", "parameter-server"):
        found = _checkpoints(network.config("scheduler"))[-1:]
    else:
        raise NetworkFailed(f"a {role} keeps no files that could be corrupted")
    if not found:
        raise NetworkFailed(f"{name} has nothing yet that could be corrupted")
    return found[0]


def _checkpoints(config: dict[str, object]) -> list[Path]:
    """theta of each checkpoint in the scheduler's state directory, the newest last."""
    found = Path(str(config["state_dir"])).glob("*/checkpoints/round-*/theta.safetensors")
    return sorted(found, key=lambda path: int(path.parent.name.removeprefix("round-")))


def fill_disk(network: Network, name: str) -> Callable[[], None]:
    """Leave no byte free where node ``name`` works, which must be a file system of its own. Returns what
    makes room again.
    """
    config = network.config(name)
    directory = Path(config.get("work_dir") or config.get("state_dir") or network.root / name)
    if directory not in network.disks:
        raise NetworkFailed(f"{directory} of {name} is no small disk: it is not filled")
    filler = directory / _FILLER
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(_CHUNK)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
    return lambda: filler.unlink(missing_ok=True)

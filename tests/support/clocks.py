"""Wall clocks that jump: each node runs with a clock of its own, which ``clock.c`` makes wrong (needs gcc).

The monotonic clock is left alone, as a machine whose time is set does.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.system import System


class Clock:
    """The wall clock of one node and its executors, right until :meth:`set` to something else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.write_bytes(bytes(8))

    def set(self, offset_s: int) -> None:
        """It is wrong by that many seconds, from now on."""
        with self._path.open("r+b", buffering=0) as file:
            file.write(offset_s.to_bytes(8, "little", signed=True))


def clock_of(system: System, name: str) -> Clock:
    """A clock for node ``name``, which is not running yet."""
    library = system.root / "clock.so"
    if not library.exists():
        source = Path(__file__).with_name("clock.c")
        command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    path = system.root / f"{name}.clock"
    system.prefixes[name] = ("env", f"CLOCK_OFFSET_FILE={path}", f"LD_PRELOAD={library}")
    return Clock(path)

"""``python -m bench [name ...]``: run the named benchmarks, or all but the long ones; exit code 1 when a
bound is missed.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

#: What takes so long that it must be named.
LONG = {"chaos", "idle", "outer_defaults"}


def names() -> list[str]:
    """Benchmarks are the modules here that have a ``main``."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not path.name.startswith("_") and "\ndef main() -> int:" in path.read_text():
            found.append(path.stem)
    return found


def run(chosen: list[str]) -> int:
    """Run them one after the other; the worst exit code."""
    known = names()
    if unknown := [name for name in chosen if name not in known]:
        print(f"there is no benchmark {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    short = [name for name in known if name not in LONG]
    return max(int(importlib.import_module(f"bench.{name}").main()) for name in chosen or short)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

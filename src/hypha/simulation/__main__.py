"""``python -m hypha.simulation``: random schedules by seed, shrunk where they fail; with ``--run``, scenarios
that come as lines of JSON on standard input, for whoever runs many.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from hypha.simulation.search import run_lines, search


def main() -> int:
    """Entry point; the exit code is 1 when a scenario failed."""
    parser = argparse.ArgumentParser(prog="python -m hypha.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many random schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--with",
        dest="change",
        metavar="MODULE:FUNCTION",
        default="",
        help="called before the first run: something that changes the code, to see whether that is noticed",
    )
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        if options.change:
            module, _, function = options.change.partition(":")
            getattr(importlib.import_module(module), function)()
        run_lines(sys.stdin.buffer, sys.stdout.buffer)
        sys.stdout.flush()
        # what was killed in a world must not be collected
        os._exit(0)
    failed = search(options.first, options.seeds, options.processes, print, change=options.change)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

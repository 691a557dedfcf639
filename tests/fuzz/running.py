"""Running the fuzzers: one example, and ``python -m tests.fuzz.running SECONDS`` for each of them in turn.

One fails where a decoder raises what it should not, takes longer than a loop may stand still, or keeps
memory; hypothesis has shrunk the example by then, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import trio
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tests.fuzz.bridge import fuzz_bridge
from tests.fuzz.connections import fuzz_connections
from tests.fuzz.decoders import Target, targets
from tests.fuzz.mutation import ODD_VALUES, mutated, mutations, oddly_encoded

#: Longer, and whoever else waits for the loop notices; a megabyte of MessagePack takes a tenth of it.
SLOW_S = 2.0
#: What a decoder may have kept after all its examples.
GROWTH_BYTES = 200 << 20
EXAMPLES = 500


def spoilt(target: Target) -> st.SearchStrategy[bytes]:
    """Bytes for ``target``: good ones that were mutated, or with an odd value somewhere, or any at all."""
    found = [st.builds(mutated, st.sampled_from(target.seeds), mutations()), st.binary(max_size=64)]
    if target.values:
        odd = st.sampled_from(ODD_VALUES)
        value = st.sampled_from(target.values)
        found.append(st.builds(oddly_encoded, value, st.just(target.encoding), st.floats(0, 1), odd))
    return st.one_of(found)


def check(target: Target, data: bytes) -> None:
    """What is not one of the target's errors comes out; so does an AssertionError where it took too long."""
    began = time.process_time()
    with contextlib.suppress(*target.errors):
        target.read(data)
    took_s = time.process_time() - began
    assert took_s < SLOW_S, f"{target.name} took {took_s:.1f} s for {len(data)} bytes"


def fuzz(target: Target, seconds: float) -> int:
    """How many examples were tried."""
    count, number, until = 0, time.time_ns() & 0xFFFF, time.monotonic() + seconds
    process, before = psutil.Process(), 0
    while time.monotonic() < until:
        number += 1

        @seed(number)
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(spoilt(target))
        def run(data: bytes) -> None:
            nonlocal count
            count += 1
            if time.monotonic() < until:
                check(target, data)

        run()
        gc.collect()
        memory = process.memory_info().rss
        before = before or memory
        assert memory < before + GROWTH_BYTES, f"{target.name} kept {(memory - before) >> 20} MiB"
    return count


def names() -> list[str]:
    """Of all fuzzers."""
    with tempfile.TemporaryDirectory(prefix="hypha-fuzz-") as directory:
        return [*dict.fromkeys(target.name for target in targets(Path(directory))), "bridge", "connections"]


def run(name: str, seconds: float) -> str:
    """Run one of them in this process; what came of it, in a line."""
    number = time.time_ns() & 0xFFFF
    with tempfile.TemporaryDirectory(prefix="hypha-fuzz-") as directory:
        if name == "bridge":
            return f"{name}: {trio.run(fuzz_bridge, Path(directory), number, seconds)} connections"
        if name == "connections":
            fuzzer = trio.run(fuzz_connections, Path(directory), number, seconds)
            return f"{name}: {fuzzer.sent} messages with seed {number}: {fuzzer.by_way}"
        # several unions have one name
        same = [one for one in targets(Path(directory)) if one.name == name]
        count = sum(fuzz(target, seconds / len(same)) for target in same)
        return f"{name}: {count} examples"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=600.0, help="for each of them")
    parser.add_argument("--only", default="", help="those whose names hold this text")
    parser.add_argument("--at-once", type=int, default=1, help="each in a process of its own")
    parser.add_argument("--name", help="this one, in this process")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if options.name is not None:
        print(run(options.name, options.seconds), flush=True)
        return 0

    def begin(name: str) -> int:
        command = [sys.executable, "-m", "tests.fuzz.running", str(options.seconds), "--name", name]
        return subprocess.run(command, check=False).returncode

    chosen = [name for name in names() if options.only in name]
    with ThreadPoolExecutor(options.at_once) as pool:
        codes = list(pool.map(begin, chosen))
    for name, code in zip(chosen, codes, strict=True):
        if code:
            print(f"{name}: FAILED", flush=True)
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())

"""Running the fuzzers: one example, and ``python -m tests.fuzz.running SECONDS`` for each of them in turn.

A run ends at the first decoder that raises what it should not, takes longer than a loop may stand still, or
keeps memory; hypothesis has shrunk the example by then.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
import tempfile
import time
import warnings
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, nargs="?", default=600.0, help="for each of them")
    parser.add_argument("--only", default="", help="those whose names hold this text")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="hypha-fuzz-") as directory:
        for target in targets(Path(directory)):
            if options.only in target.name:
                count = fuzz(target, options.seconds)
                print(f"{target.name}: {count} examples", flush=True)
        if options.only in "bridge":
            count = trio.run(fuzz_bridge, Path(directory), time.time_ns() & 0xFFFF, options.seconds)
            print(f"bridge: {count} connections", flush=True)
        if options.only in "connections":
            number = time.time_ns() & 0xFFFF
            fuzzer = trio.run(fuzz_connections, Path(directory), number, options.seconds)
            print(f"connections: {fuzzer.sent} messages with seed {number}: {fuzzer.by_way}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

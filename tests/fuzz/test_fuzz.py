"""A few examples for each decoder, and a moment of a hostile peer; ``make fuzz`` goes on for longer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from tests.fuzz.bridge import fuzz_bridge
from tests.fuzz.connections import fuzz_connections
from tests.fuzz.decoders import Target, targets
from tests.fuzz.mutation import with_odd_value
from tests.fuzz.running import check, spoilt

_DIRECTORY = tempfile.TemporaryDirectory(prefix="hypha-fuzz-")
TARGETS = {target.name: target for target in targets(Path(_DIRECTORY.name))}


@pytest.mark.parametrize("name", TARGETS)
def test_a_decoder_refuses_what_is_spoilt(name: str) -> None:
    target: Target = TARGETS[name]

    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(spoilt(target))
    def run(data: bytes) -> None:
        check(target, data)

    for seed in target.seeds[:3]:
        target.read(seed)
    run()


@pytest.mark.loopback
async def test_nodes_outlive_a_hostile_peer(tmp_path: Path) -> None:
    fuzzer = await fuzz_connections(tmp_path, seed=1, seconds=3.0)
    assert fuzzer.sent > 20


async def test_a_bridge_outlives_a_hostile_executor(tmp_path: Path) -> None:
    assert await fuzz_bridge(tmp_path, seed=1, seconds=2.0) > 8


@pytest.mark.real
@pytest.mark.timeout(180)
async def test_nodes_outlive_a_minute_of_a_hostile_peer(tmp_path: Path) -> None:
    fuzzer = await fuzz_connections(tmp_path, seed=2, seconds=60.0)
    assert fuzzer.sent > 500


def test_the_fuzzer_notices_a_decoder_that_fails() -> None:
    careless = Target("careless", lambda data: data.decode(), (b"good",))

    @settings(max_examples=200, deadline=None, database=None)
    @given(spoilt(careless))
    def run(data: bytes) -> None:
        check(careless, data)

    with pytest.raises(UnicodeDecodeError):
        run()


def test_odd_values_are_put_in_every_place() -> None:
    tree = {"a": [1, {"b": 2}], "c": 3}
    found = {repr(with_odd_value(tree, where / 6, "odd")) for where in range(6)}
    assert len(found) == 6
    assert tree == {"a": [1, {"b": 2}], "c": 3}

"""Which way to a peer is tried first, after some have failed and others worked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from hypha.net.bulk.ways import FAILED_WAY_LIFE_S, WAY_LIFE_S, Way, Ways
from hypha.net.bulk.wire import BulkConnections, ConnectionBroken

PEER = "peer"


def _ways() -> Ways:
    return Ways(cast("BulkConnections", SimpleNamespace(reached_by=lambda _: False)))


def _fails(ways: Ways, way: Way) -> None:
    with pytest.raises(ConnectionBroken), ways.trying(PEER, way):
        raise ConnectionBroken("no answer")


def _works(ways: Ways, way: Way) -> None:
    with ways.trying(PEER, way):
        pass


async def test_a_way_that_failed_while_a_line_was_cut_is_soon_tried_first_again(
    autojump_clock: MockClock,
) -> None:
    """The relay was preferred for ten minutes after every cut of some seconds."""
    ways = _ways()
    for _ in range(5):  # whatever is sent meanwhile fails by it
        _fails(ways, "direct")
        await trio.sleep(1)
    _works(ways, "stream")
    assert ways.to(PEER)[0] == "stream"
    await trio.sleep(FAILED_WAY_LIFE_S)
    assert ways.to(PEER)[0] == "direct"


async def test_a_way_that_never_works_is_tried_less_and_less_often(autojump_clock: MockClock) -> None:
    ways, pauses = _ways(), []
    for _ in range(8):
        _fails(ways, "direct")
        _works(ways, "stream")
        failed_at = trio.current_time()
        while ways.to(PEER)[0] != "direct":
            await trio.sleep(1)
        pauses.append(trio.current_time() - failed_at)
    assert pauses == [15, 30, 60, 120, 240, 480, WAY_LIFE_S, WAY_LIFE_S]
    _works(ways, "direct")
    _fails(ways, "direct")
    await trio.sleep(FAILED_WAY_LIFE_S)
    assert ways.to(PEER)[0] == "direct"

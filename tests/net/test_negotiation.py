"""A stream's protocol is agreed on in one journey, with any implementation of multistream-select."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing
from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from tests.support.network import Network, address_of

from hypha.errors import PeerUnreachable
from hypha.messages import Health, PeerRef
from hypha.net.libp2p.host import EagerClient

SPOKEN, UNKNOWN = TProtocol("/spoken/1"), TProtocol("/unknown/1")


class Pipe:
    """What the library reads from and writes to; counts writes."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self._stream = stream
        self.writes = 0

    async def write(self, data: bytes) -> None:
        self.writes += 1
        await self._stream.send_all(data)

    async def read(self, n: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(n))

    async def close(self) -> None:
        await self._stream.aclose()

    async def hang_up(self) -> None:
        await self._stream.send_eof()


def pipes() -> tuple[Pipe, Pipe]:
    near, far = trio.testing.memory_stream_pair()
    return Pipe(near), Pipe(far)


async def serve(pipe: Pipe) -> None:
    """The library's other end."""
    await Multiselect({SPOKEN: None}).negotiate(MultiselectCommunicator(pipe), 5)


async def test_one_write_is_enough() -> None:
    near, far = pipes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, far)
        assert await EagerClient().select_one_of([SPOKEN], MultiselectCommunicator(near), 5) == SPOKEN
    assert near.writes == 1


async def test_a_protocol_that_the_other_end_does_not_speak() -> None:
    near, far = pipes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, far)
        with pytest.raises(MultiselectClientError, match=r"'na' where /unknown/1"):
            await EagerClient().select_one_of([UNKNOWN], MultiselectCommunicator(near), 5)
        nursery.cancel_scope.cancel()


async def test_several_to_choose_from_are_asked_for_one_by_one() -> None:
    near, far = pipes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, far)
        chosen = await EagerClient().select_one_of([UNKNOWN, SPOKEN], MultiselectCommunicator(near), 5)
    assert chosen == SPOKEN


async def test_an_end_that_hangs_up_and_one_that_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    near, far = pipes()
    await far.hang_up()
    with pytest.raises(MultiselectClientError, match="broke off"):
        await EagerClient().select_one_of([SPOKEN], MultiselectCommunicator(near), 5)
    near, far = pipes()
    with pytest.raises(MultiselectClientError, match="no answer within 5 s"):
        await EagerClient().select_one_of([SPOKEN], MultiselectCommunicator(near), 5)


@pytest.mark.loopback
async def test_between_nodes(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    async with network.leaf("a") as one, network.leaf("b") as two:
        ref = PeerRef(peer=two.peer_id, addresses=(address_of(two),))
        with caplog.at_level(logging.CRITICAL), pytest.raises(PeerUnreachable, match="/nobody/speaks/1"):
            await one.open_stream(ref, "/nobody/speaks/1")
        # the connection is as good as before
        await one.request(ref, Health())

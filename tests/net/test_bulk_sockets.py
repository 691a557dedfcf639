"""What a blocking socket in a thread can do to its transfer."""

from __future__ import annotations

import select
import socket

import pytest
import trio

from hypha.net.bulk.sockets import in_thread
from hypha.net.bulk.wire import ConnectionBroken


async def test_a_socket_that_was_closed_under_its_thread_is_a_broken_link() -> None:
    """poll says ValueError then, which once ended a whole node."""
    one, other = socket.socketpair()
    other.close()
    one.close()
    with pytest.raises(ConnectionBroken, match="closed"):
        await in_thread(one, lambda: select.poll().register(one), trio.CapacityLimiter(1))


async def test_other_mistakes_are_not_taken_for_a_broken_link() -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(ValueError, match="invalid literal"):
        await in_thread(one, lambda: int("x"), trio.CapacityLimiter(1))

"""Names with several addresses, and names that do not resolve for a while."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from tests.support.network import Network, address_of, until

from hypha.errors import NetworkError, PeerUnreachable
from hypha.messages import Health, PeerRef
from hypha.net.peers.addresses import host_and_port

pytestmark = pytest.mark.loopback


class Names(trio.abc.HostnameResolver):
    """A resolver whose answers are ``addresses``; a name without any does not resolve."""

    def __init__(self, **addresses: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.asked = 0
        trio.socket.set_custom_hostname_resolver(self)

    async def getaddrinfo(
        self, host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> list[Any]:
        self.asked += 1
        await trio.lowlevel.checkpoint()
        name = host.decode() if isinstance(host, bytes) else host
        found = []
        for address in self.addresses.get(name.partition(".")[0], ()):
            kind = socket.AF_INET6 if ":" in address else socket.AF_INET
            if family in (socket.AF_UNSPEC, kind):
                place = (address, 0, 0, 0) if kind == socket.AF_INET6 else (address, 0)
                found.append((kind, socket.SOCK_STREAM, 6, "", place))
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def silent(host: str, port: int) -> AsyncIterator[None]:
    """Something that takes connections at an address, and never says a word."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(port, host=host)

        async def hold(stream: trio.SocketStream) -> None:
            await trio.sleep_forever()

        nursery.start_soon(trio.serve_listeners, hold, [listener])
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("dead", [("127.0.0.2", "127.0.0.3"), ("::1", "127.0.0.2", "127.0.0.3")])
@pytest.mark.parametrize("named", [True, False])
async def test_of_several_addresses_of_a_name_the_one_that_works_is_found(
    network: Network, dead: tuple[str, ...], named: bool
) -> None:
    """One refuses, one never answers, and the last one in the list is the gateway's."""
    Names(gateway=(*dead, "127.0.0.1"))
    async with network.gateway() as gateway:
        port = host_and_port(address_of(gateway))[1]
        address = f"/dns/gateway.test/tcp/{port}" + (f"/p2p/{gateway.peer_id}" if named else "")
        async with silent("127.0.0.3", port):
            began = trio.current_time()
            async with network.leaf("worker", [address]) as worker:
                assert worker.gateway == gateway.peer_id
                assert trio.current_time() - began < network.timings.dial_s


async def test_only_addresses_of_the_wanted_family_are_tried(network: Network) -> None:
    names = Names(gateway=("::1", "127.0.0.1"))
    async with network.gateway() as gateway, network.leaf("worker") as worker:
        port = host_and_port(address_of(gateway))[1]
        assert await worker.who_is_at(f"/dns4/gateway.test/tcp/{port}") == gateway.peer_id
        with pytest.raises(NetworkError, match="nothing listens there"):
            await worker.who_is_at(f"/dns6/gateway.test/tcp/{port}")
        assert names.asked == 2


@pytest.mark.parametrize("named", [True, False])
async def test_a_gateway_whose_name_does_not_resolve_yet_is_waited_for(
    network: Network, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start, and again later: the node stays, and tells the name once."""
    names = Names()
    identity = network.pki.identity("gateway", ("gateway",))
    async with network.gateway(identity=identity) as gateway:
        address = address_of(gateway)
    port = host_and_port(address)[1]
    text = f"/dns4/gateway.test/tcp/{port}" + (f"/p2p/{gateway.peer_id}" if named else "")
    here = (f"/ip4/127.0.0.1/tcp/{port}",)
    with caplog.at_level(logging.INFO, "hypha.net"):
        async with network.leaf("worker", [text], connected=False) as worker:
            async with network.gateway(identity=identity, listen=here) as gateway:
                await until(lambda: names.asked >= 3)
                told = [one for one in caplog.messages if "No gateway can be reached" in one]
                assert len(told) == 1
                assert "/dns4/gateway.test/" in told[0]
                assert "the name has no address now (Name or service not known)" in told[0]
                names.addresses["gateway"] = ("127.0.0.1",)
                await until(lambda: worker.gateway == gateway.peer_id)
                names.addresses.clear()
                names.asked = 0
                caplog.clear()
            # now it is gone, and its name with it
            await until(lambda: names.asked >= 3)
            assert "Lost gateway" in caplog.text
            assert caplog.text.count("the name has no address now") == 1
            async with network.gateway(identity=identity, listen=here) as gateway:
                names.addresses["gateway"] = ("127.0.0.1",)
                await until(lambda: worker.gateway == gateway.peer_id)


async def test_a_peer_may_say_any_name(network: Network) -> None:
    """One that does not resolve ends nobody, and one in a network that is excluded leads nowhere."""
    names = Names(inside=("127.0.0.1",))
    async with network.leaf("worker", exclude_cidr=("127.0.0.0/8",)) as worker, network.leaf("data") as data:
        port = host_and_port(data.listen_addresses()[0])[1]
        for name, why in (
            ("inside.test", "exclude_cidr"),
            ("gone.test", "no address"),
        ):
            ref = PeerRef(peer=data.peer_id, addresses=(f"/dns4/{name}/tcp/{port}",))
            with pytest.raises(PeerUnreachable, match=why):
                await worker.request(ref, Health())
        assert names.asked
        assert not data.connections()

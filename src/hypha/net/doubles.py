"""One certificate on two machines: the node that is connected goes on, the other one is turned away.

Both would be one peer to everybody else, and requests would reach now one and now the other. Every node
tells in its handshake which one it is, by a number of its own, and whoever is dialled looks whether another
one with that certificate is connected and alive. It is said here, to the one that is turned away and to the
other one. One that does not answer any more makes room at once: its machine may have been started again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hypha.errors import NetworkError
from hypha.messages import Acknowledged, Request, Response, SameCertificate
from hypha.naming import cleaned, shown
from hypha.net.peers import Peers, secured
from hypha.net.refusals import SAME_CERTIFICATE, Refusal
from hypha.net.transport import TlsConnection

logger = logging.getLogger(__name__)

#: A connection over which nothing comes for so long after something was asked for is over.
ALIVE_S = 2.0
#: It is said again after this long.
REMIND_S = 60.0
_REQUEST_S = 10.0


class Doubles:
    """Looks at whoever has dialled; ``request`` asks a peer, ``nursery`` is the node's."""

    def __init__(
        self,
        own_peer: str,
        peers: Peers,
        request: Callable[[str, Request, float], Awaitable[Response]],
        nursery: trio.Nursery,
    ) -> None:
        self._own_peer = own_peer
        self._peers = peers
        self._request = request
        self._nursery = nursery
        #: when it was said of whom
        self._said: dict[str, float] = {}
        self._own_said_at = -math.inf

    async def admit(self, new: TlsConnection) -> Refusal | None:
        """Why the node behind ``new`` may not come in; ``None`` where it may."""
        peer, place = str(new.get_remote_peer()), _place_of(new)
        if new.instance is None:
            return None  # an older node, or a probe, which is no node of the network
        if peer == self._own_peer:
            self._say(peer, "this node", place)
            return Refusal(SAME_CERTIFICATE, "the address that was dialled")
        for connection in self._peers.connections_of(peer):
            tls = secured(connection)
            if tls.instance in (None, new.instance):
                continue
            if await self._answers(connection):
                self._say(peer, f"the one at {_place_of(tls)}", place)
                return Refusal(SAME_CERTIFICATE, _place_of(tls))
            why = f"it does not answer, and another node with its certificate has come from {place}"
            await self._peers.cut(connection, "silent", why)
        return None

    async def answer(self, caller: str, request: SameCertificate) -> Acknowledged:
        """This node is told that it has a double."""
        now = trio.current_time()
        if now - self._own_said_at >= REMIND_S:
            self._own_said_at = now
            logger.error(
                "Another node uses the certificate of this one: it has come to %s from %s, and was turned "
                "away. Make a certificate for each machine (`hypha-certutil node`).",
                shown(caller),
                cleaned(request.address),
                extra={"peer_id": caller},
            )
        return Acknowledged()

    async def _answers(self, connection: Any) -> bool:
        """Whether a live node is at the other end: it is asked, and anything that comes counts."""
        tls, asked = secured(connection), trio.current_time()
        with trio.move_on_after(ALIVE_S):
            await self._peers.probe(connection.muxed_conn)
            # a connection tells nobody that something came
            while tls.last_received <= asked and not tls.ended:  # noqa: ASYNC110
                await trio.sleep(0.02)
        return tls.last_received > asked and not tls.ended

    def _say(self, peer: str, who: str, place: str) -> None:
        now = trio.current_time()
        self._said = {one: at for one, at in self._said.items() if now - at < REMIND_S}
        if peer in self._said:
            return
        self._said[peer] = now
        logger.error(
            "Two nodes use the certificate of %s: %s goes on, the one at %s is turned away. Make a "
            "certificate for each machine (`hypha-certutil node`).",
            shown(peer),
            who,
            place,
            extra={"peer_id": peer},
        )
        if peer != self._own_peer:
            self._nursery.start_soon(self._tell, peer, place)

    async def _tell(self, peer: str, place: str) -> None:
        try:
            await self._request(peer, SameCertificate(address=place), _REQUEST_S)
        except NetworkError as exc:
            # an older node does not know the request
            logger.debug("It was not told of its double: %s", exc, extra={"peer_id": peer})


def _place_of(tls: TlsConnection) -> str:
    address = tls.get_remote_address()
    return f"{address[0]}:{address[1]}" if address else "an address behind a relay"

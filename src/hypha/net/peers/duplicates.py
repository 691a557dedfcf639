"""One certificate on two machines: the node that is connected goes on, the other one is turned away.

Both would be one peer to everybody else, and requests would reach now one and now the other. Every node
states in its handshake which one it is, by a number of its own, and whoever is dialled looks whether another
one with that certificate is connected and alive. A gateway asks the other gateways, too, before it lets a
node in, and compares all of its nodes with theirs now and then, as two gateways may have been apart when the
nodes came. It is logged here, at the one that is turned away and at the other one. One that does not answer
any more makes room at once: its machine may have been started again, or have moved to another gateway.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from hypha.errors import NetworkError
from hypha.messages import (
    MAX_ADDRESS_LENGTH,
    MAX_INSTANCE_LENGTH,
    MAX_NODE_RUNS,
    Acknowledged,
    DoublesFound,
    FindDoubles,
    NodeRun,
    Request,
    Response,
    SameCertificate,
)
from hypha.naming import cleaned, shown
from hypha.net.libp2p.mutual_tls import HANDSHAKE_TIMEOUT_S
from hypha.net.libp2p.tls_connection import TlsConnection
from hypha.net.peers.inbound_limits import OverLimit, counted
from hypha.net.peers.reasons import SAME_CERTIFICATE, Refusal
from hypha.net.peers.table import PeerTable, secured
from hypha.node import Changes

logger = logging.getLogger(__name__)

#: A connection over which nothing comes for so long after something was asked for is over.
ALIVE_S = 2.0
#: It is said again after this long.
REMIND_S = 60.0
_REQUEST_S = 10.0
#: The other gateways are waited for no longer while a node waits to be let in: they need ``ALIVE_S`` for one
#: that is silent there. So many questions are under way to each of them.
ASK_S = 3.5
ASKED_AT_ONCE = 8
#: One that has not answered in time is not waited for again for so long.
FORGIVEN_S = 30.0
#: Of two nodes whose connections were made within so long, the smaller number goes on: the way between two
#: gateways takes time, and each of the two must come to the same end.
CLOSE_S = 5.0

Ask = Callable[[str, Request, float], Awaitable[Response]]


@dataclass
class _Claim:
    """A node that is about to be let in. ``elsewhere`` tells where another one with its certificate is."""

    instance: str
    place: str
    decided: trio.Event = field(default_factory=trio.Event)
    elsewhere: str | None = None
    #: when it counts no longer, whether its connection was seen or not
    ends_at: float = math.inf


class Doubles:
    """Looks at whoever has dialled; ``request`` asks a peer, ``nursery`` is the node's, ``own`` is the node.
    ``gateways`` are the others that are connected, where this node is a gateway.
    """

    def __init__(
        self,
        own: NodeRun,
        peers: PeerTable,
        request: Ask,
        gateways: Callable[[], list[str]] | None,
        nursery: trio.Nursery,
    ) -> None:
        self._own = own
        self._peers = peers
        self._request = request
        self._gateways = gateways
        self._nursery = nursery
        #: by peer; no more than there are handshakes
        self._claims: dict[str, _Claim] = {}
        #: by gateway: questions under way, and until when it is not waited for
        self._asking: Counter[str] = Counter()
        self._excused: dict[str, float] = {}
        self._over_limit = OverLimit()
        # from now on the connection itself is seen
        peers.on_connected.append(lambda peer: self._claims.pop(peer, None))

    async def admit(self, new: TlsConnection) -> Refusal | None:
        """Why the node behind ``new`` may not come in; ``None`` where it may."""
        peer, place = str(new.get_remote_peer()), _place_of(new)
        if new.instance is None:
            return None  # an older node, or a probe, which is no node of the network
        if peer == self._own.peer:
            self._say(peer, "this node", f"the one at {place}")
            return Refusal(SAME_CERTIFICATE, "the address that was dialled")
        run = NodeRun(peer=peer, instance=new.instance[:MAX_INSTANCE_LENGTH], address=place)
        if self._gateways is None:
            elsewhere = await self._beside(run)
        else:
            elsewhere = await self._claim(run)
        if elsewhere is None:
            return None
        due = self._say(peer, f"the one at {elsewhere}", f"the one at {place}")
        if due and self._peers.is_connected(peer):  # elsewhere, that gateway tells it
            self._nursery.start_soon(self._tell, peer, SameCertificate(address=place))
        return Refusal(SAME_CERTIFICATE, elsewhere)

    async def _claim(self, run: NodeRun) -> str | None:
        """Where another node with the certificate of ``run`` is, here or at another gateway. All dials of one
        node share the answer, and of two nodes that come at the same time one waits outside.
        """
        claim = self._claim_of(run.peer)
        if claim is None:
            claim = self._claims[run.peer] = _Claim(run.instance, run.address)
            # a task of the node: the dial may end before, and others wait for the answer
            self._nursery.start_soon(self._decide, run, claim)
        elif claim.instance != run.instance:
            return claim.place
        await claim.decided.wait()
        return claim.elsewhere

    def _claim_of(self, peer: str) -> _Claim | None:
        now = trio.current_time()
        self._claims = {one: claim for one, claim in self._claims.items() if claim.ends_at > now}
        return self._claims.get(peer)

    async def _decide(self, run: NodeRun, claim: _Claim) -> None:
        with trio.move_on_after(ASK_S):
            async with trio.open_nursery() as nursery:

                async def note(look: Callable[[], Awaitable[str | None]]) -> None:
                    if (found := await look()) is not None:
                        claim.elsewhere = claim.elsewhere or found
                        nursery.cancel_scope.cancel()

                nursery.start_soon(note, partial(self._beside, run))
                for gateway in self._gateways() if self._gateways else ():
                    nursery.start_soon(note, partial(self._at, gateway, run))
        # what is left of the handshake, then its connection is there or never will be
        claim.ends_at = trio.current_time() + (HANDSHAKE_TIMEOUT_S if claim.elsewhere is None else 0.0)
        claim.decided.set()

    async def _at(self, gateway: str, run: NodeRun) -> str | None:
        """Where ``gateway`` has another node with the certificate of ``run``; ``None`` also where it does not
        say: a network must not stand still for one gateway.
        """
        excused = self._excused.get(gateway, 0.0) > trio.current_time()
        if excused or self._asking[gateway] >= ASKED_AT_ONCE:
            return None
        found = await self._ask(gateway, (run,), ASK_S)
        return f"{found[0].address}, connected to {shown(gateway)}" if found else None

    async def _ask(self, gateway: str, runs: tuple[NodeRun, ...], timeout_s: float) -> tuple[NodeRun, ...]:
        """Which of ``runs`` are at ``gateway`` as other nodes; none where it does not answer."""
        answered = False
        try:
            with counted(self._asking, gateway):
                answer = await self._request(gateway, FindDoubles(nodes=runs), timeout_s)
            answered = True
        except NetworkError as exc:
            # one of an earlier version does not know the request
            logger.debug("%s does not look for doubles: %s", shown(gateway), exc)
            return ()
        finally:
            if not answered:
                self._excused[gateway] = trio.current_time() + FORGIVEN_S
        wanted = {run.peer for run in runs}
        found = answer.found if isinstance(answer, DoublesFound) else ()
        return tuple(one for one in found if one.peer in wanted)

    async def _beside(self, run: NodeRun) -> str | None:
        """Where this node has another one with the certificate of ``run``; one that is silent makes room."""
        alive: list[str] = []

        async def look(connection: Any) -> None:
            if await self._answers(connection):
                alive.append(_place_of(secured(connection)))
                return
            came = f"another node with its certificate has come from {cleaned(run.address)}"
            await self._peers.cut(connection, "silent", f"it does not answer, and {came}")

        async with trio.open_nursery() as nursery:
            for connection in self._peers.connections_of(run.peer):
                tls = secured(connection)
                if tls.instance not in (None, run.instance) and _goes_before(tls, run):
                    nursery.start_soon(look, connection)
        return alive[0] if alive else None

    async def find(self, caller: str, request: FindDoubles) -> DoublesFound:
        """Another gateway asks which of its nodes are here as well."""
        found: list[NodeRun] = []

        async def look(run: NodeRun) -> None:
            if (place := await self._here(run)) is None:
                return
            found.append(NodeRun(peer=run.peer, instance=run.instance, address=place[:MAX_ADDRESS_LENGTH]))
            theirs = f"the one at {cleaned(run.address)}, which has come to {shown(caller)},"
            if self._say(run.peer, f"the one at {place}", theirs) and run.peer != self._own.peer:
                told = SameCertificate(address=run.address, gateway=caller)
                self._nursery.start_soon(self._tell, run.peer, told)

        async with trio.open_nursery() as nursery:
            for run in request.nodes:
                nursery.start_soon(look, run)
        return DoublesFound(found=tuple(found))

    async def _here(self, run: NodeRun) -> str | None:
        if run.peer == self._own.peer:
            return None if run.instance == self._own.instance else "the gateway itself"
        claim = self._claim_of(run.peer) if run.connected_s is None else None
        if claim is not None and claim.instance != run.instance:
            # both have come just now; each gateway has noted its own before it asked
            if claim.decided.is_set() or claim.instance < run.instance:
                return claim.place
            claim.elsewhere = claim.elsewhere or cleaned(run.address)
        return await self._beside(run)

    async def compare(self, changed: Changes, every_s: float) -> None:
        """Compare the nodes that are connected with those of the other gateways, when ``changed`` notes that
        there are others and every ``every_s`` seconds; cut those that have come later.
        """
        seen = 0
        while True:
            with trio.move_on_after(every_s):
                seen = await changed.wait(seen)
            for gateway in self._gateways() if self._gateways else ():
                await self._compare_with(gateway)

    async def _compare_with(self, gateway: str) -> None:
        now = trio.current_time()
        runs = {
            one.peer: one
            for one in (_run_of(connection, now) for connection in self._peers.inbound())
            if one is not None and one.peer != gateway
        }
        everybody = tuple(runs.values())
        for start in range(0, len(everybody), MAX_NODE_RUNS):
            for there in await self._ask(gateway, everybody[start : start + MAX_NODE_RUNS], _REQUEST_S):
                await self._cut(runs[there.peer], f"{cleaned(there.address)}, connected to {shown(gateway)}")

    async def _cut(self, run: NodeRun, elsewhere: str) -> None:
        for connection in self._peers.connections_of(run.peer):
            if secured(connection).instance == run.instance:
                why = f"another node uses its certificate, the one at {elsewhere}, and was there before"
                await self._peers.cut(connection, "double", why)

    async def answer(self, caller: str, request: SameCertificate) -> Acknowledged:
        """This node is told that it has a double."""
        if self._over_limit.is_first(self._own.peer, "told", REMIND_S):
            logger.error(
                "Another node uses the certificate of this one: it has come to %s from %s, and was turned "
                "away. Make a certificate for each machine (`hypha-certutil node`).",
                shown(request.gateway or caller),
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

    def _say(self, peer: str, goes_on: str, turned_away: str) -> bool:
        """Whether it was due to be said."""
        if not self._over_limit.is_first(peer, "double", REMIND_S):
            return False
        logger.error(
            "Two nodes use the certificate of %s: %s goes on, %s is turned away. Make a certificate for each "
            "machine (`hypha-certutil node`).",
            shown(peer),
            goes_on,
            turned_away,
            extra={"peer_id": peer},
        )
        return True

    async def _tell(self, peer: str, told: SameCertificate) -> None:
        try:
            await self._request(peer, told, _REQUEST_S)
        except NetworkError as exc:
            # an older node does not know the request
            logger.debug("It was not told of its double: %s", exc, extra={"peer_id": peer})


def _goes_before(tls: TlsConnection, run: NodeRun) -> bool:
    """Whether the node behind ``tls`` goes on beside ``run``, another one with its certificate."""
    if run.connected_s is None:
        return True
    longer_s = trio.current_time() - tls.since - run.connected_s
    if abs(longer_s) < CLOSE_S:
        return (tls.instance or "") < run.instance
    return longer_s > 0


def _run_of(connection: Any, now: float) -> NodeRun | None:
    tls = secured(connection)
    if tls.instance is None:
        return None
    return NodeRun(
        peer=str(tls.get_remote_peer()),
        instance=tls.instance[:MAX_INSTANCE_LENGTH],
        address=_place_of(tls),
        connected_s=now - tls.since,
    )


def _place_of(tls: TlsConnection) -> str:
    address = tls.get_remote_address()
    return f"{address[0]}:{address[1]}" if address else "an address behind a relay"

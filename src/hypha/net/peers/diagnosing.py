"""What a node answers to who looks for a fault: can the caller be dialled, how fast is the way to it, and who
is connected with a gateway.

The first two cost this node something, so both are bounded: a caller has one at a time, all callers together
a few, and what is measured has a budget. A gateway dials nothing but the IP address that the caller's own
connection comes from, so that it cannot be sent to look at somebody else's ports.

Who is connected may be asked by whoever may connect. Where a node may be dialled is told of one that is asked
for by its PeerID alone, so that nobody copies the whole network's addresses in one go.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import trio

from hypha.errors import NetworkError, Refused
from hypha.messages import (
    MAX_LISTED_PEERS,
    BandwidthMeasured,
    DialBack,
    DialedBack,
    DialResult,
    ListedPeer,
    MeasureBandwidth,
    PeerList,
)
from hypha.net.peers.addresses import Address, ip_of, parse
from hypha.net.peers.inbound_limits import Recent
from hypha.node import ConnectionInfo

#: Callers that are served at once; of each caller one request.
MAX_AT_ONCE = 4
#: One address is dialled for so long.
DIAL_S = 5.0
#: A caller may have so much measured, both ways together, within so long.
BUDGET_BYTES, BUDGET_S = 32 << 20, 60.0
#: Callers whose spending is remembered; the oldest are forgotten.
_REMEMBERED = 1024

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Diagnosing:
    """``who_is_at`` dials an address, ``hosts_of`` is where a caller's direct connections come from."""

    def __init__(
        self,
        who_is_at: Callable[[Address], Awaitable[str]],
        hosts_of: Callable[[str], Iterable[str]],
    ) -> None:
        self._who_is_at = who_is_at
        self._hosts_of = hosts_of
        self._served: set[str] = set()
        #: caller -> since when its budget is counted, and how many bytes are spent
        self._spent: Recent[str, tuple[float, int]] = Recent(_REMEMBERED)

    @contextmanager
    def _place(self, caller: str) -> Iterator[None]:
        """Raises Refused where there is none."""
        if caller in self._served or len(self._served) >= MAX_AT_ONCE:
            raise Refused("busy", "others are being measured or dialled; try again in some seconds")
        self._served.add(caller)
        try:
            yield
        finally:
            self._served.discard(caller)

    async def dial_back(self, caller: str, request: DialBack) -> DialedBack:
        """Dial the addresses that are the caller's, all at once. Raises Refused."""
        hosts = {ipaddress.ip_address(host.partition("%")[0]) for host in self._hosts_of(caller)}
        found: dict[int, DialResult] = {}

        async def dial(number: int, text: str) -> None:
            found[number] = await self._dial(text, hosts)

        with self._place(caller):
            async with trio.open_nursery() as nursery:
                for number, text in enumerate(request.addresses):
                    nursery.start_soon(dial, number, text)
        return DialedBack(results=tuple(found[number] for number in range(len(request.addresses))))

    async def _dial(self, text: str, hosts: set[IpAddress]) -> DialResult:
        try:
            address = parse(text)
        except ValueError as exc:
            return DialResult(address=text, reason=str(exc))
        if address.is_circuit or ip_of(address) not in hosts:
            seen = " or ".join(sorted(map(str, hosts))) or "an address behind a relay"
            return DialResult(
                address=text,
                reason=f"not tried: who asks comes from {seen}, and nothing else is dialled",
            )
        try:
            with trio.fail_after(DIAL_S):
                return DialResult(address=text, peer=await self._who_is_at(Address(address.transport, None)))
        except trio.TooSlowError:
            return DialResult(address=text, reason=f"no answer within {DIAL_S:g} s")
        except NetworkError as exc:
            return DialResult(address=text, reason=str(exc).removeprefix(f"{address.transport}: "))

    async def measure(self, caller: str, request: MeasureBandwidth) -> BandwidthMeasured:
        """Answer with as many bytes as are wanted. Raises Refused."""
        self._spend(caller, len(request.payload) + request.reply_bytes)
        with self._place(caller):
            await trio.lowlevel.checkpoint()
            return BandwidthMeasured(payload=bytes(request.reply_bytes))

    def _spend(self, caller: str, size: int) -> None:
        now = trio.current_time()
        since, spent = self._spent.get(caller, (now, 0))
        if now - since >= BUDGET_S:
            since, spent = now, 0
        fits = spent + size <= BUDGET_BYTES
        self._spent[caller] = (since, spent + size if fits else spent)
        if not fits:
            left_s = BUDGET_S - (now - since)
            raise Refused("busy", f"enough was measured for now; try again in {left_s:.0f} s")


def listed(
    connections: Sequence[ConnectionInfo],
    caller: str = "",
    wanted: str = "",
    addresses_of: Callable[[str], Sequence[str]] = lambda peer: (),
) -> PeerList:
    """The peers behind ``connections``, but for ``caller``, in order of PeerIDs, each once: by its direct
    connection, where there is one. ``wanted`` is the only one that ``caller`` asks for, and is told with the
    addresses that it has said of itself. This machine's own operator, who is no ``caller``, sees everybody.
    """
    best: dict[str, ConnectionInfo] = {}
    for one in connections:
        known = best.get(one.peer)
        if known is None or (one.kind, known.kind) == ("direct", "relayed"):
            best[one.peer] = one
    found = [
        ListedPeer(
            peer=one.peer,
            name=one.name,
            organization=one.organization,
            roles=tuple(sorted(one.roles)),
            way=one.kind,
            round_trip_s=one.round_trip_s,
            addresses=tuple(addresses_of(wanted)) if wanted else (),
        )
        for peer, one in sorted(best.items())
        if peer != caller and wanted in ("", peer)
    ]
    most = MAX_LISTED_PEERS if caller else len(found)
    return PeerList(peers=tuple(found[:most]), more=max(0, len(found) - most))

"""What metrics show of a node while it lives: connections, mesh, transfers, certificates and, of a gateway,
what it relays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hypha.runtime import wall_time
from hypha.telemetry import instruments
from hypha.telemetry.metrics import Reading

if TYPE_CHECKING:
    from hypha.net.node import Libp2pNode


@contextmanager
def shown(node: Libp2pNode) -> Iterator[None]:
    """Gauges show ``node`` meanwhile."""
    with ExitStack() as stack:
        for gauge, source in (
            (instruments.CONNECTIONS, lambda: _connections(node)),
            (instruments.ROUND_TRIP, lambda: _round_trips(node)),
            (instruments.GOSSIP_MESH, lambda: node.mesh_size),
            (instruments.TRANSFERS, lambda: _transfers(node)),
            (instruments.CERTIFICATE_EXPIRES, lambda: _expirations(node)),
            (instruments.UPTIME, lambda: node.uptime_s),
        ):
            stack.enter_context(gauge.watch(source))
        if (hop := node.hop) is not None:
            stack.enter_context(instruments.CIRCUITS.watch(lambda: hop.circuits))
            stack.enter_context(instruments.RESERVATIONS.watch(lambda: hop.reservations))
        if (server := node.dht_server) is not None:
            stack.enter_context(instruments.DHT_ROUTING_TABLE.watch(lambda: server.known))
        yield


def _connections(node: Libp2pNode) -> list[Reading]:
    # kinds of which there are none are shown, too: a series that vanishes alarms nobody
    count: Counter[tuple[str, str]] = Counter()
    for one in node.connections():
        count[one.direction, one.kind] += 1
    return [
        ({"direction": direction, "way": way}, count[direction, way])
        for direction in ("inbound", "outbound")
        for way in ("direct", "relayed")
    ]


def _round_trips(node: Libp2pNode) -> list[Reading]:
    best: dict[str, float] = {}
    for one in node.connections():
        if one.round_trip_s is not None:
            best[one.peer] = min(one.round_trip_s, best.get(one.peer, one.round_trip_s))
    return [({"peer": peer}, seconds) for peer, seconds in best.items()]


def _transfers(node: Libp2pNode) -> list[Reading]:
    return [({"direction": name}, number) for name, number in node.transfers.under_way.items()]


def _expirations(node: Libp2pNode) -> list[Reading]:
    now = wall_time()
    return [({"file": file}, end.timestamp() - now) for file, end in node.identity.expirations().items()]

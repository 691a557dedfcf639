"""The libp2p host, made as Hypha needs it: one security transport, one muxer, no life of its own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import trio
from libp2p import new_host
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID

from hypha.net.libp2p import identify_bounds, negotiation, yamux
from hypha.net.libp2p.inbound_streams import InboundStreams
from hypha.net.libp2p.mutual_tls import PROTOCOL_ID, MutualTls
from hypha.net.libp2p.negotiation import EagerClient
from hypha.net.libp2p.shared_port import SharedPortTcp
from hypha.net.libp2p.streams import contained
from hypha.net.libp2p.tls_connection import TlsConnection


class _NoAutoConnector:
    """Stands where the library keeps a task that dials peers by itself."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def run_background_task(self, nursery: trio.Nursery) -> None: ...

    async def maybe_connect(self) -> None: ...

    def record_disconnect(self, peer_id: ID) -> None: ...


def make_host(security: MutualTls, port: SharedPortTcp, max_connections: int, identify: bool = False) -> Any:
    """A host that listens nowhere yet, with ``security`` as the only way in.

    With ``identify`` it asks every peer what it is and speaks, which only a DHT server needs to know;
    all of them answer.
    """
    yamux.install()
    negotiation.install()
    identify_bounds.install()
    host = new_host(
        key_pair=security.key_pair,
        sec_opt={PROTOCOL_ID: security},
        muxer_preference="YAMUX",
        transports=[port],
        disable_identify_address_discovery=True,
        connection_config=ConnectionConfig(
            max_connections=max_connections,
            min_connections=0,
            low_watermark=0,
            high_watermark=max_connections,
            # two sides that dial each other at once may have one each; trimming could cut the used one
            max_connections_per_peer=8,
        ),
    )
    swarm = host.get_network()
    # our own limits apply; the library's would reset what it does not like instead of saying so
    swarm.set_resource_manager(None)
    # whatever a peer's stream does to the library is an error in a task of the swarm, which would end with it
    swarm.common_stream_handler = contained(swarm.common_stream_handler)
    # its places would be taken by whoever connects, certificate or not; ours are in ``arrivals``
    swarm._inbound_limiter = trio.CapacityLimiter(math.inf)
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm._select_connection = _passing_guests_over(swarm._select_connection)
    host.multiselect_client = EagerClient()
    host.multiselect = InboundStreams(host.multiselect)
    identify_bounds.stop_pushes(host)
    if not identify:
        host._should_identify_peer = lambda peer_id: False
    # it would dial whomever identify ever told of, hundreds at a time
    swarm.auto_connector = _NoAutoConnector()
    return host


def _passing_guests_over(select: Callable[[list[Any], ID], Any]) -> Callable[[list[Any], ID], Any]:
    """``select``, which chooses the connection for a new stream, without those of guests while there is
    another: who looks on beside a node, with its certificate, is not to be asked in its place.
    """

    def select_node(connections: list[Any], peer_id: ID) -> Any:
        return select([one for one in connections if not _is_guest(one)] or connections, peer_id)

    return select_node


def _is_guest(connection: Any) -> bool:
    """Whoever has dialled, and did not say which node it is."""
    tls: TlsConnection = connection.muxed_conn.secured_conn
    return not tls.is_initiator and tls.instance is None


def quiet_library() -> None:
    """What the library logs is said by us in one line, or is no news."""
    logging.getLogger("libp2p").setLevel(logging.ERROR)
    logging.getLogger("libp2p.security").setLevel(logging.INFO)
    for name in ("host", "network", "network.auto_connector", "protocol_muxer", "stream_muxer", "transport"):
        logging.getLogger(f"libp2p.{name}").setLevel(logging.CRITICAL)

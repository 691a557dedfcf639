"""The network room: :func:`open_node` and what comes out of it. Only here is libp2p imported.

``async with open_node(options) as node``: ``request``, ``answer(type, handler)`` (roles stand in
``access.py``), ``publish``, ``subscribe``, ``provide``, ``find_providers``, ``report``, ``answer_reports``,
``watch_peers``, ``transfers``. ``Refused``, ``PeerUnreachable``, ``RequestTimeout`` and ``TransferFailed``
are all that comes out of ``net/`` after start-up. Any call may be cancelled at any time without harm to the
connection.

- One port: first byte 0x16 is the bulk plane's TLS, 0x13 libp2p. Only our own security transport is offered.
- libp2p imports all that it has. What of it nobody here uses (QUIC, WebSockets, mDNS, ACME, a DNS resolver)
  is replaced before that by modules that do nothing (``libp2p/__init__.py``, ``processes/left_out.py``):
  half of what the import costs, 25 MB a process.
- Liveness is ours: the last byte received counts, quiet connections get a yamux ping, silence cuts.
- All dials go through ``dialing.py``: direct addresses first, each a moment after the one before, relayed
  ones later. On a simultaneous dial the smaller PeerID holds on.
- A leaf is meshed with one gateway and moves on to the next at once. Gateways run the DHT server, leaves a
  small client over the same wire, because the library's look-up dials everybody it ever heard of.
- The relay speaks circuit v2 with our own hop: a circuit owns its two streams and nothing else.
- RPC: a stream a request, its protocol agreed on in one journey (``host.py``), 64 in at once, 16 a
  peer, ``busy`` beyond; each peer has two places of its own, who shares a lease (``Node.prefer``) all of its
  16.
- What one peer takes is bounded where it comes in: ``peers/inbound_limits.py`` (connections, and all peers
  together), ``yamux.py`` (bytes and streams), ``streams.py`` (each protocol), ``rpc.py``, ``dht_records.py``,
  ``host.py`` (identify). Health is one of the requests and answered by every component.
- A worker's machine that refuses connections: for a second: the worker is dead, and its leases with it.
- A line that was cut: is tried once a second where the kernel can (``TCP_RTO_MAX_MS``, Linux 6.15); elsewhere
  after TCP's doubling pauses.
- Names for people: from verified certificates, one table a process; machines get whole PeerIDs.
"""

import hypha.net.libp2p  # noqa: F401  before anything that imports libp2p
from hypha.net.bulk.transfers import BulkTransfers, meta_of
from hypha.net.node import Libp2pNode
from hypha.net.opening import open_node
from hypha.net.options import NodeOptions, RelayLimits, Timings, options_from
from hypha.node import ConnectionInfo

__all__ = [
    "BulkTransfers",
    "ConnectionInfo",
    "Libp2pNode",
    "NodeOptions",
    "RelayLimits",
    "Timings",
    "meta_of",
    "open_node",
    "options_from",
]

"""The network room: :func:`open_node` and what comes out of it. Only here is libp2p imported."""

import hypha.net.libp2p.without  # noqa: F401  before anything that imports libp2p
from hypha.net.bulk.transfers import BulkTransfers, meta_of
from hypha.net.libp2p.relay import RelayLimits
from hypha.net.node import Libp2pNode
from hypha.net.opening import open_node
from hypha.net.options import NodeOptions, Timings, options_from
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

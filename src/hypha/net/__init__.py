"""The network room: :func:`open_node` and what comes out of it. Only here is libp2p imported."""

import hypha.net.unused  # noqa: F401  before anything that imports libp2p
from hypha.net.life import open_node
from hypha.net.node import Node
from hypha.net.options import NodeOptions, Timings, options_from
from hypha.net.peers import ConnectionInfo, PeerLost
from hypha.net.relay import RelayLimits
from hypha.net.signals import Changes
from hypha.net.transfers import Transfers, meta_of

__all__ = [
    "Changes",
    "ConnectionInfo",
    "Node",
    "NodeOptions",
    "PeerLost",
    "RelayLimits",
    "Timings",
    "Transfers",
    "meta_of",
    "open_node",
    "options_from",
]

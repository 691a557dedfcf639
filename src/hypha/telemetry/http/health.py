"""What a node reports of its own health, over local HTTP and to peers who ask."""

from __future__ import annotations

import trio

from hypha import __version__
from hypha.features import features_of
from hypha.messages import HealthReport
from hypha.node import Node


def health_of(node: Node) -> HealthReport:
    """A leaf is well while it has a gateway, a gateway while it runs."""
    details = {
        "gateway": node.gateway or "none",
        "connections": str(len(node.connections())),
        "addresses": " ".join(node.ref().addresses),
        # should stay where it is however long the node runs
        "tasks": str(trio.lowlevel.current_statistics().tasks_living),
    }
    for more in node.health_details:
        details.update(more())
    return HealthReport(
        healthy=node.gateway is not None or node.options.hop or not node.options.gateways,
        component=node.options.component,
        version=__version__,
        peer=node.peer_id,
        uptime_s=node.uptime_s,
        details=details,
        features=features_of(node.options.component),
    )

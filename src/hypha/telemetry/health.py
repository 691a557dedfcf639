"""What a node says of its own health, over local HTTP and to peers who ask."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import trio

from hypha import __version__
from hypha.messages import HealthReport, PeerRef


class _Options(Protocol):
    @property
    def component(self) -> str: ...
    @property
    def gateways(self) -> Collection[str]: ...
    @property
    def hop(self) -> bool: ...


class ShownNode(Protocol):
    """What is looked at of a ``hypha.net`` node, which this room may not import."""

    #: what the component adds
    health_details: list[Callable[[], dict[str, str]]]

    @property
    def peer_id(self) -> str: ...
    @property
    def options(self) -> _Options: ...
    @property
    def uptime_s(self) -> float: ...
    @property
    def gateway(self) -> str | None: ...
    def ref(self) -> PeerRef: ...
    def connections(self) -> Collection[object]: ...


def health_of(node: ShownNode) -> HealthReport:
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
    )

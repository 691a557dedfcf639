"""What a node reports of itself, over local HTTP and to peers who ask: how it is, and what it runs with."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

import trio

from hypha import __version__
from hypha.features import features_of
from hypha.messages import HealthReport
from hypha.node import Node

#: what messages, weights and arithmetic go through
PACKAGES = (
    "accelerate",
    "libp2p",
    "msgspec",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trio",
)


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


@functools.cache
def versions() -> dict[str, str]:
    """What to compare when two nodes of one job do not behave alike, by name: ``hypha``, ``python`` and those
    of :data:`PACKAGES` that are installed. Reads some files the first time.
    """
    found = {"hypha": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

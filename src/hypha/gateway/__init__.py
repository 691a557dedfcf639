"""The gateway: the entry point of a network, which relays for nodes that cannot be dialled."""

from hypha.gateway.service import run_gateway

__all__ = ["run_gateway"]

"""The gateway: the entry point of a network, which relays circuits for nodes that cannot be dialled, forwards
gossip, serves the DHT and links with others.

All of that is the node's own (``hop=True``); what is left here is to say where it may be dialled.
"""

from __future__ import annotations

import logging
from functools import partial

import trio

from hypha.config.models import GatewayConfig
from hypha.messages import PeerRef
from hypha.net import Libp2pNode, open_node, options_from
from hypha.net.peers.diagnosing import listed
from hypha.telemetry import health_of, serve_http
from hypha.waiting import IDLE_S, Reminder

logger = logging.getLogger(__name__)


async def run_gateway(
    config: GatewayConfig, *, task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run until cancelled; started with the gateway's PeerID and addresses. Raises ConfigError."""
    async with open_node(options_from(config, "hypha-gateway")) as node, trio.open_nursery() as nursery:
        if config.http_address is not None:
            peers = {"peers": lambda: listed(node.connections())}
            health = partial(serve_http, config.http_address, lambda: health_of(node), lookups=peers)
            await nursery.start(health)
        ref = node.ref()
        logger.info(
            "Gateway is ready; nodes reach it at %s.",
            " ".join(ref.addresses) or "no address: external_addresses and exclude_cidr leave none",
            extra={"peer_id": node.peer_id, "addresses": list(ref.addresses)},
        )
        task_status.started(ref)
        await _say_while_alone(node)


async def _say_while_alone(node: Libp2pNode) -> None:
    """Until cancelled: that nobody is connected, less and less often while that is so."""
    reminder = Reminder(longest_s=IDLE_S)
    while True:
        await trio.sleep(max(1.0, reminder.next_at - trio.current_time()))
        if node.connections():
            reminder.reset()
        elif reminder.due():
            logger.info(
                "No node is connected: waiting for nodes whose gateway_addresses lead here, such as %s.",
                next(iter(node.ref().addresses), "none that this gateway knows of"),
            )

"""The network as a node of this configuration would be in it: a node opens, looks around, and ends.

It has the certificate of the node that it looks for, and is a guest beside it where that runs: it takes no
reservation and no gossip of it, and listens only where nobody else does.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace

import trio

from hypha.cli.doctor.gathered import (
    Contact,
    DatasetObservations,
    Dialled,
    NetworkObservations,
    Observations,
    Port,
    Running,
)
from hypha.cli.doctor.gathering import Gathering, readable
from hypha.cli.doctor.gathering.contacts import NAME_S, dial_back, look_at
from hypha.cli.doctor.gathering.dataset import Asking, gather_dataset
from hypha.cli.doctor.gathering.own_node import ask_health, free_ports, gather_running, owned
from hypha.cli.doctor.subject import Subject
from hypha.config.job import DatasetRef
from hypha.config.models import GatewayConfig, LeafConfig, NodeConfig
from hypha.errors import NetworkError
from hypha.net import Libp2pNode, open_node, options_from
from hypha.net.peers.addresses import host_and_port
from hypha.pki.identity import Identity

PORTS_S, JOIN_S, DATASET_S, RUNNING_S, EXTERNAL_S = 15.0, 10.0, 60.0, 10.0, 15.0
#: of many that serve the dataset so many are looked at
MOST_DATA_NODES = 3
#: what may ask a data node for a dataset
_CONSUMERS = ("scheduler", "worker")


async def gather_network(
    gathering: Gathering,
    subject: Subject,
    config: NodeConfig,
    identity: Identity,
    peers: Sequence[str] = (),
    dataset: DatasetRef | None = None,
) -> Observations:
    """The network, the ``dataset``, and the node where it runs; ``peers`` are addresses to look at beside the
    gateways. Raises ConfigError where the node cannot listen.
    """
    ports = await gathering.in_thread(PORTS_S, "which ports are free", free_ports, config) or []
    taken = any(one.state != "free" and one.key == "listen_addresses" for one in ports)
    options = replace(
        options_from(config, "hypha-doctor", identity),
        listen=() if taken else tuple(config.listen_addresses),
        hop=False,
        reserve=False,
        guest=True,
    )
    async with open_node(options) as node:
        looked = await gathering.within(
            PORTS_S, "who has the ports", lambda: owned(ports, node.peer_id, node.who_is_at)
        )
        found = looked or tuple(ports)
        running = any(one.state == "own" for one in found)
        gateways, others = await _contacts(node, gathering, config, peers)
        dialled = await _dialled(node, gathering, config, found, gateways, running)
        # what a data node sends goes to the node that runs, never to a guest beside it
        consumes = subject.component in _CONSUMERS
        pull = consumes and not running
        served = await _dataset(node, gathering, subject, dataset, gateways, Asking(consumes, pull))
        data_nodes = [
            await look_at(node, gathering, provider.peer)
            for provider in (served.providers if served is not None else ())[:MOST_DATA_NODES]
            if not provider.reason
        ]
        return Observations(
            network=NetworkObservations(found, gateways, others, tuple(data_nodes), tuple(dialled), running),
            dataset=served,
            running=await _running(gathering, subject, config, found),
        )


async def _contacts(
    node: Libp2pNode, gathering: Gathering, config: NodeConfig, peers: Sequence[str]
) -> tuple[tuple[Contact, ...], tuple[Contact, ...]]:
    gateways = config.gateway_addresses if isinstance(config, LeafConfig | GatewayConfig) else []
    if any(not one.startswith("/") for one in peers):
        await gathering.within(JOIN_S, "who has the PeerIDs", lambda: _joined(node))
    # one after the other: they would take each other's bandwidth
    found = [await look_at(node, gathering, address, gateway=True) for address in gateways]
    return tuple(found), tuple([await look_at(node, gathering, address) for address in peers])


async def _dialled(
    node: Libp2pNode,
    gathering: Gathering,
    config: NodeConfig,
    ports: tuple[Port, ...],
    gateways: tuple[Contact, ...],
    running: bool,
) -> list[Dialled]:
    """By gateways, and from here where this is one itself, or where somebody was told to dial it."""
    if any(one.state in ("other", "foreign") and one.key == "listen_addresses" for one in ports):
        return []  # there it is not this node that listens
    found: list[Dialled] = []
    numbers = await _ports_of(node, config, running)
    external: list[str] = []
    for address in config.external_addresses:
        places = await _places(address)
        external += places
        if not places and not isinstance(config, GatewayConfig):
            found.append(Dialled(address, reason="its name has no address here", external=True))
    for gateway in gateways:
        if gateway.failure is not None or gateway.stalled or gateway.relayed or not gateway.seen_at:
            continue
        host, _ = host_and_port(gateway.seen_at[-1])
        kind = "ip6" if ":" in host else "ip4"
        here = [f"/{kind}/{host}/tcp/{number}" for number in numbers]
        if wanted := list(dict.fromkeys([*external, *here])):
            tried = await dial_back(node, gathering, gateway, wanted)
            found += [replace(one, external=one.address in external) for one in tried]
    if isinstance(config, GatewayConfig):
        for address in config.external_addresses:
            found.append(await _dialled_from_here(node, address))
    return found


async def _ports_of(node: Libp2pNode, config: NodeConfig, running: bool) -> list[int]:
    """Those that this node listens on, or the running one; none where nobody knows that."""
    fixed = {number for address in config.listen_addresses if (number := host_and_port(address)[1])}
    listening = {host_and_port(address)[1] for address in node.listen_addresses()}
    if listening and not running:
        return sorted(listening)
    if running and not fixed and config.http_address is not None:
        report = await ask_health(config.http_address)
        addresses = report.details.get("addresses", "").split() if report is not None else []
        fixed = {host_and_port(one)[1] for one in addresses if "/p2p-circuit" not in one}
    return sorted(fixed)


async def _places(address: str) -> list[str]:
    """An external address with its name replaced by where that leads: a gateway resolves none for others."""
    parts = address.split("/")
    if parts[1] in ("ip4", "ip6"):
        return [address]
    with trio.move_on_after(NAME_S):
        try:
            answers = await trio.socket.getaddrinfo(parts[2], None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        hosts = dict.fromkeys(str(sockaddr[0]).partition("%")[0] for *_, sockaddr in answers)
        return ["/".join(["", "ip6" if ":" in host else "ip4", host, *parts[3:5]]) for host in hosts]
    return []


async def _dialled_from_here(node: Libp2pNode, address: str) -> Dialled:
    try:
        with trio.fail_after(EXTERNAL_S):
            peer = await node.who_is_at(address)
    except trio.TooSlowError:
        return Dialled(address, reason=f"no answer within {EXTERNAL_S:g} s")
    except NetworkError as exc:
        return Dialled(address, reason=readable(str(exc).partition(": ")[2] or str(exc)))
    wrong = f"{peer} is there, which is another node" if peer != node.peer_id else ""
    return Dialled(address, reason=wrong)


async def _dataset(
    node: Libp2pNode,
    gathering: Gathering,
    subject: Subject,
    dataset: DatasetRef | None,
    gateways: tuple[Contact, ...],
    asking: Asking,
) -> DatasetObservations | None:
    if dataset is None or subject.component == "data":
        return None
    what = f"who serves {dataset.dataset!r}"
    if not any(one.failure is None for one in gateways):
        why = "no gateway can be asked" if gateways else "this configuration names no gateway to ask"
        gathering.note(what, why)
        return None
    if await gathering.within(JOIN_S, what, lambda: _joined(node)) is None:
        return None
    return await gathering.within(DATASET_S, what, lambda: gather_dataset(node, dataset, asking))


async def _joined(node: Libp2pNode) -> bool:
    await node.wait_connected()
    return True


async def _running(
    gathering: Gathering, subject: Subject, config: NodeConfig, ports: tuple[Port, ...]
) -> Running | None:
    address = config.http_address
    if address is None or not any(one.state == "own" and one.key == "http_address" for one in ports):
        return None
    scheduler = subject.component == "scheduler"
    return await gathering.within(
        RUNNING_S, "what the running node counts", lambda: gather_running(address, scheduler)
    )

"""The network as a node of this configuration would be in it: a node opens, looks around, and ends.

It has the certificate of the node that it looks for, and is a guest beside it where that runs: it takes no
reservation and no gossip of it, and listens only where nobody else does. It asks who announces and who serves
the job's dataset, and how fast a slice comes.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from hypha.cli.doctor.gathered import (
    Contact,
    DatasetObservations,
    Dialled,
    NetworkObservations,
    Observations,
    Port,
    Provider,
)
from hypha.cli.doctor.gathering import Gathering, at_once, readable
from hypha.cli.doctor.gathering.contacts import NAME_S, dial_back, look_at
from hypha.cli.doctor.gathering.own_node import ask_health, free_ports, owned, read_running
from hypha.cli.doctor.subject import Subject
from hypha.config.job import DatasetRef
from hypha.config.models import GatewayConfig, LeafConfig, NodeConfig
from hypha.data.serving.served import KIND
from hypha.errors import NetworkError, Refused
from hypha.messages import DatasetDescription, DescribeDataset, Manifest, PeerRef, PullFile
from hypha.naming import name_of
from hypha.net import Libp2pNode, open_node, options_from
from hypha.net.peers.addresses import host_and_port
from hypha.pki.identity import Identity
from hypha.rules.manifests import manifest_problem
from hypha.runtime import in_thread
from hypha.scheduler.data.datasets import why_not_used

PORTS_S, JOIN_S, DATASET_S, RUNNING_S, EXTERNAL_S = 15.0, 10.0, 60.0, 10.0, 15.0
ASK_S = 10.0
#: a slice is pulled for so long at most: what came until then says how fast it comes
PULL_S = 5.0
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
    """``peers`` are addresses beside the gateways. Raises ConfigError where the node cannot listen."""
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
        owners = partial(owned, ports, node.peer_id, node.who_is_at)
        found = await gathering.within(PORTS_S, "who has the ports", owners) or tuple(ports)
        return await _Surroundings(node, gathering, subject.component, config, found).look(peers, dataset)


@dataclass
class _Surroundings:
    """Those of ``node``, which is a guest beside the ``component`` that it looks for."""

    node: Libp2pNode
    gathering: Gathering
    component: str
    config: NodeConfig
    ports: tuple[Port, ...]
    gateways: tuple[Contact, ...] = ()

    @property
    def running(self) -> bool:
        """Whether the component runs here."""
        return any(one.state == "own" for one in self.ports)

    async def look(self, peers: Sequence[str], dataset: DatasetRef | None) -> Observations:
        config, component = self.config, self.component
        if any(not one.startswith("/") for one in peers):
            await self.gathering.within(JOIN_S, "who has the PeerIDs", self._joined)
        # one after the other: they would take each other's bandwidth
        named = config.gateway_addresses if isinstance(config, LeafConfig | GatewayConfig) else []
        self.gateways = tuple([await self._contact(address, gateway=True) for address in named])
        others = tuple([await self._contact(address) for address in peers])
        dialled = tuple(await self._dialled())
        served = None if dataset is None or component == "data" else await self._dataset(dataset)
        providers = served.providers[:MOST_DATA_NODES] if served is not None else ()
        data_nodes = tuple([await self._contact(one.peer) for one in providers if not one.reason])
        counted = None
        if any(one.state == "own" and one.key == "http_address" for one in self.ports):
            arguments = (read_running, config.http_address, component == "scheduler")
            counted = await self.gathering.in_thread(RUNNING_S, "what the running node counts", *arguments)
        network = NetworkObservations(self.ports, self.gateways, others, data_nodes, dialled, self.running)
        return Observations(network=network, dataset=served, running=counted)

    async def _contact(self, address: str, gateway: bool = False) -> Contact:
        return await look_at(self.node, self.gathering, address, gateway)

    async def _joined(self) -> bool:
        await self.node.wait_connected()
        return True

    async def _dialled(self) -> list[Dialled]:
        """By gateways, and from here where this is one itself, or where somebody was told to dial it."""
        if any(one.state in ("other", "foreign") and one.key == "listen_addresses" for one in self.ports):
            return []  # there it is not this node that listens
        config = self.config
        found: list[Dialled] = []
        numbers = await self._port_numbers()
        external: list[str] = []
        for address in config.external_addresses:
            places = await _places(address)
            external += places
            if not places and not isinstance(config, GatewayConfig):
                found.append(Dialled(address, reason="its name has no address here", external=True))
        for gateway in self.gateways:
            if gateway.failure is not None or gateway.stalled or gateway.relayed or not gateway.seen_at:
                continue
            host, _ = host_and_port(gateway.seen_at[-1])
            kind = "ip6" if ":" in host else "ip4"
            here = [f"/{kind}/{host}/tcp/{number}" for number in numbers]
            if wanted := list(dict.fromkeys([*external, *here])):
                tried = await dial_back(self.node, self.gathering, gateway, wanted)
                found += [replace(one, external=one.address in external) for one in tried]
        if isinstance(config, GatewayConfig):
            found += [await self._dialled_from_here(address) for address in config.external_addresses]
        return found

    async def _port_numbers(self) -> list[int]:
        """Those that this node listens on, or the running one; none where nobody knows that."""
        fixed = {number for address in self.config.listen_addresses if (number := host_and_port(address)[1])}
        listening = {host_and_port(address)[1] for address in self.node.listen_addresses()}
        if listening and not self.running:
            return sorted(listening)
        if self.running and not fixed and self.config.http_address is not None:
            report = await ask_health(self.config.http_address)
            addresses = report.details.get("addresses", "").split() if report is not None else []
            fixed = {host_and_port(one)[1] for one in addresses if "/p2p-circuit" not in one}
        return sorted(fixed)

    async def _dialled_from_here(self, address: str) -> Dialled:
        try:
            with trio.fail_after(EXTERNAL_S):
                peer = await self.node.who_is_at(address)
        except trio.TooSlowError:
            return Dialled(address, reason=f"no answer within {EXTERNAL_S:g} s")
        except NetworkError as exc:
            return Dialled(address, reason=readable(str(exc).partition(": ")[2] or str(exc)))
        wrong = f"{peer} is there, which is another node" if peer != self.node.peer_id else ""
        return Dialled(address, reason=wrong)

    async def _dataset(self, wanted: DatasetRef) -> DatasetObservations | None:
        what = f"who serves {wanted.dataset!r}"
        if not any(one.failure is None for one in self.gateways):
            why = "no gateway can be asked" if self.gateways else "this configuration names no gateway to ask"
            self.gathering.note(what, why)
            return None
        if await self.gathering.within(JOIN_S, what, self._joined) is None:
            return None
        return await self.gathering.within(DATASET_S, what, partial(self._providers, wanted))

    async def _providers(self, wanted: DatasetRef) -> DatasetObservations:
        name, find = wanted.dataset, self.node.find_providers
        refs = await find(name)
        near = [] if refs else [one for one in _alike(name) if await find(one)]
        others = sorted((ref for ref in refs if ref.peer != self.node.peer_id), key=lambda ref: ref.peer)
        found = await at_once(*(partial(self._provider, ref, wanted) for ref in others))
        return DatasetObservations(name, tuple(found), tuple(near), wanted.manifest_hash)

    async def _provider(self, ref: PeerRef, wanted: DatasetRef) -> Provider:
        node, describe = self.node, self.component in _CONSUMERS
        try:
            if describe:
                answer = await node.request(ref, DescribeDataset(dataset=wanted.dataset), ASK_S)
            else:
                # as far as a node knows that may not ask
                await node.connect(ref)
        except NetworkError as exc:
            refused = isinstance(exc, Refused) and exc.code in ("role", "not-allowed", "not-found")
            reason = exc.reason if isinstance(exc, Refused) else str(exc)
            return Provider(ref.peer, name_of(ref.peer), reason=readable(reason), refused=refused)
        ways = {one.kind for one in node.connections() if one.peer == ref.peer}
        provider = Provider(ref.peer, name_of(ref.peer), relayed=ways == {"relayed"})
        if not describe:
            return provider
        if (problem := why_not_used(wanted, node, ref.peer)) is not None:
            return replace(provider, reason=f"it {problem}", refused=True)
        if not isinstance(answer, DatasetDescription):
            return replace(provider, reason=f"it answers with {type(answer).__name__}")
        if problem := await in_thread(manifest_problem, answer.manifest, answer.manifest_hash):
            return replace(provider, reason=f"it does not serve what it says: {readable(problem)}")
        # what a data node sends goes to the node that runs, never to a guest beside it
        rate = None if self.running else await _pull_rate(node, ref, wanted.dataset, answer.manifest)
        largest = max((one.size for one in answer.manifest.slices), default=0)
        return replace(provider, manifest_hash=answer.manifest_hash, largest_slice=largest, rate=rate)


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


def _alike(name: str) -> list[str]:
    """Names that somebody may have meant: the gateways' directory finds exact ones alone."""
    changed = (
        name.strip(),
        name.lower(),
        name.replace("_", "-"),
        name.replace("-", "_"),
        name.replace(" ", "-"),
        name.rstrip("/").rpartition("/")[2],
        name.lower().replace("_", "-"),
    )
    return [one for one in dict.fromkeys(changed) if one and one != name]


async def _pull_rate(node: Libp2pNode, ref: PeerRef, name: str, manifest: Manifest) -> float | None:
    """Bytes a second, of the largest slice; None where nothing came; why stands in the provider's log."""
    sizes = {index: one.size for index, one in enumerate(manifest.slices) if one.size > 0}
    if not sizes:
        return None
    index = max(sizes, key=lambda one: sizes[one])
    request = PullFile(kind=KIND, name=f"{name}/{index}")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "slice"
        began = trio.current_time()
        try:
            with trio.move_on_after(PULL_S):
                await node.transfers.pull(ref, request, place, None, sizes[index])
        except NetworkError:
            return None
        took_s = trio.current_time() - began
        parts = [place, place.with_name(f"{place.name}.part")]
        came = max((one.stat().st_size for one in parts if one.exists()), default=0)
    return came / took_s if took_s > 0 else None

"""``hypha peers``, ``hypha lookup`` and ``hypha leases``: who is in the network, where, and who holds which
lease.

The network is asked as a guest. A gateway does not dial itself: it is asked over its local HTTP, as workers
and schedulers are of their leases.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import trio
import typer

from hypha.cli.asking import NotThere, any_component, as_guest, ask_health, ask_local
from hypha.cli.component import HTTP_PORTS
from hypha.cli.options import ConfigOption
from hypha.cli.printing import add_row, print_json, print_table, table_of
from hypha.cli.running import identity_of
from hypha.errors import HyphaError, NetworkError, PeerUnreachable
from hypha.messages import ListPeers, PeerList, PeerRef, Resources
from hypha.naming import legible
from hypha.naming import shown as named_peer
from hypha.scheduler.status.snapshot import JobSnapshot, LeaseSnapshot
from hypha.worker.leasing.given import GivenLeases

if TYPE_CHECKING:
    from hypha.config.models import NodeConfig
    from hypha.net import Libp2pNode

T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Seconds.", min=0.1)]

#: of the base58 of a key's multihash
_PEER_ID = re.compile(r"(?:12D3KooW|Qm|16Uiu2)[1-9A-HJ-NP-Za-km-z]{30,60}")


class FoundPeer(msgspec.Struct, frozen=True):
    """A node that was looked up: where it is said to be, and whether it could be reached from here."""

    peer: str
    name: str = ""
    organization: str = ""
    roles: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    #: gateways that it is connected with
    gateways: tuple[str, ...] = ()
    reached: str = ""
    round_trip_s: float | None = None
    problem: str = ""


def peers(
    config: ConfigOption = None,
    json_: JsonOption = False,
    timeout_s: TimeoutOption = 10.0,
) -> None:
    """List the nodes that are connected with the gateways of a configuration."""
    loaded = any_component(config)
    if _gateways(loaded):
        ask = partial(_each_gateway, config=loaded, request=ListPeers())
        found = _as_guest(loaded, "hypha-peers", timeout_s, ask)
    else:
        address = loaded.http_address or f"127.0.0.1:{HTTP_PORTS['gateway']}"
        found = {address: ask_local(address, "peers", PeerList)}
    if json_:
        print_json(found)
        return
    for gateway, listed in found.items():
        called = f"gateway /p2p/{gateway}" if _PEER_ID.fullmatch(gateway) else f"the gateway at {gateway}"
        print(f"{len(listed.peers) + listed.more} nodes are connected with {called}")
        table = table_of("node", "roles", "organisation", "connected", "round trip", "PeerID")
        for one in listed.peers:
            trip = "" if one.round_trip_s is None else f"{one.round_trip_s * 1000:.1f} ms"
            way = "directly" if one.way == "direct" else "through a relay"
            who = named_peer(one.peer, one.name)
            add_row(table, who, " ".join(one.roles), one.organization, way, trip, one.peer)
        print_table(table)
        if listed.more:
            print(f"and {listed.more} more")


def lookup(
    what: Annotated[str, typer.Argument(help="A PeerID, or the name of a dataset.")],
    config: ConfigOption = None,
    json_: JsonOption = False,
    timeout_s: TimeoutOption = 10.0,
) -> None:
    """Find a node by its PeerID, or who serves a dataset, in the network, and try to reach it."""
    loaded = any_component(config)
    if not _gateways(loaded):
        raise HyphaError(
            "a gateway that knows no other gateway cannot look anything up with its own certificate: name "
            "the configuration of another component with --config"
        )
    by_id = _PEER_ID.fullmatch(what) is not None

    async def ask(node: Libp2pNode) -> list[FoundPeer]:
        if by_id:
            candidates = await _find_peer(node, loaded, what)
        else:
            providers = await node.find_providers(what)
            candidates = [FoundPeer(one.peer, addresses=one.addresses) for one in providers]
        return [await _try(node, one, timeout_s / 2.0) for one in candidates]

    found = _as_guest(loaded, "hypha-lookup", timeout_s * 2.0, ask)
    if json_:
        print_json(found)
    for one in found if not json_ else ():
        roles = " and ".join(one.roles) or "node"
        organization = f" of {one.organization}" if one.organization else ""
        print(legible(f"{roles} {named_peer(one.peer, one.name)}{organization}, /p2p/{one.peer}"))
        for address in one.addresses:
            print(legible(f"  at {address}"))
        for gateway in one.gateways:
            print(legible(f"  connected with gateway {gateway}"))
        trip = f", round trip {one.round_trip_s * 1000:.1f} ms" if one.round_trip_s is not None else ""
        print(legible(f"  {f'reached {one.reached}{trip}' if one.reached else one.problem}"))
    if not found:
        raise HyphaError(
            f"no gateway is connected with {what}: it does not run, or has no way to a gateway"
            if by_id
            else f"no data node announces a dataset called {what!r}: compare the name with a data node's log"
        )


def _gateways(config: NodeConfig) -> tuple[str, ...]:
    return tuple(getattr(config, "gateway_addresses", ()))


def _as_guest(
    config: NodeConfig, component: str, timeout_s: float, ask: Callable[[Libp2pNode], Awaitable[T]]
) -> T:
    """What ``ask`` finds with a node that has the certificate of ``config``. Raises NetworkError."""
    from hypha.net import NodeOptions

    options = NodeOptions(
        identity=identity_of(config),
        component=component,
        listen=(),
        gateways=_gateways(config),
        guest=True,
        reserve=False,
        exclude_cidr=tuple(config.exclude_cidr),
    )
    return as_guest(options, timeout_s, ", ".join(options.gateways), "a look-up", ask)


async def _each_gateway(node: Libp2pNode, config: NodeConfig, request: ListPeers) -> dict[str, PeerList]:
    """The answers by PeerID; of who cannot be reached stderr tells. Raises NetworkError without any."""
    from hypha.net.peers.addresses import parse

    found: dict[str, PeerList] = {}
    last: NetworkError | None = None
    for address in _gateways(config):
        try:
            peer = parse(address).peer or await node.who_is_at(address)
            if peer in found or peer == node.peer_id:
                continue
            node.learn(PeerRef(peer=peer, addresses=(address,)))
            await node.connect(peer)
            answer = await node.request(peer, request)
        except NetworkError as exc:
            print(f"note: the gateway at {address} does not answer: {exc}", file=sys.stderr)
            last = exc
            continue
        if isinstance(answer, PeerList):
            found[peer] = answer
    if not found and last is not None:
        raise last
    return found


async def _find_peer(node: Libp2pNode, config: NodeConfig, peer: str) -> list[FoundPeer]:
    """What the gateways know of it; nothing where it is connected with none of them."""
    answers = await _each_gateway(node, config, ListPeers(peer=peer))
    if peer in answers:
        # a gateway itself
        return [FoundPeer(peer, roles=("gateway",), addresses=_gateways(config))]
    listed = [(gateway, one) for gateway, answer in answers.items() for one in answer.peers]
    if not listed:
        return []
    _, one = listed[0]
    addresses = dict.fromkeys(address for _, same in listed for address in same.addresses)
    gateways = tuple(gateway for gateway, _ in listed)
    return [FoundPeer(peer, one.name, one.organization, one.roles, tuple(addresses), gateways)]


async def _try(node: Libp2pNode, found: FoundPeer, timeout_s: float) -> FoundPeer:
    """Connect with it, and note what its certificate says, and by which way it was reached."""
    if found.peer == node.peer_id:
        return msgspec.structs.replace(found, problem="it has the very certificate that this asks with")
    # by way of the connected gateways, too
    relayed = tuple(
        f"{one.address}/p2p/{one.peer}/p2p-circuit/p2p/{found.peer}"
        for one in node.connections()
        if "gateway" in one.roles and one.kind == "direct" and one.address
    )
    node.learn(PeerRef(peer=found.peer, addresses=(*found.addresses, *relayed)))
    problem = "it hung up"
    try:
        with trio.fail_after(timeout_s):
            await node.connect(found.peer)
            _, took_s, of_it = await ask_health(node, found.peer, timeout_s)
        if of_it is not None:
            return msgspec.structs.replace(
                found,
                name=of_it.name,
                organization=of_it.organization,
                roles=tuple(sorted(of_it.roles)),
                reached="directly" if of_it.kind == "direct" else "through a relay",
                round_trip_s=took_s,
            )
    except trio.TooSlowError:
        problem = f"it cannot be reached from here within {timeout_s:g} s"
    except PeerUnreachable as exc:
        problem = f"it cannot be reached from here: {exc}"
    except NetworkError as exc:
        problem = f"it answers no question: {exc}"
    return msgspec.structs.replace(found, problem=problem)


def leases(
    address: Annotated[
        str | None,
        typer.Argument(help="A worker's or scheduler's http_address; default: the configuration's."),
    ] = None,
    config: ConfigOption = None,
    json_: JsonOption = False,
) -> None:
    """Show the leases that a worker has given, or that a scheduler holds."""
    if address is None:
        loaded = any_component(config)
        if loaded.http_address is None:
            raise HyphaError(
                "its http_address is not set, and leases are told there: set it, or name an address"
            )
        address = loaded.http_address
    try:
        given = ask_local(address, "leases", GivenLeases)
    except NotThere:
        _show_held(ask_local(address, "status", JobSnapshot), json_)
        return
    if json_:
        print_json(given)
        return
    print(legible(f"the worker {given.state}; free are {_resources(given.free)}"))
    if (price := given.price) is not None:
        load = f"{price.strategy}, load {100 * price.load:.0f} %"
        told = f"it asks for {price.asked:g} a lease: {price.rest:g} at rest, floor {price.floor:g}, {load}"
        print(legible(told))
    table = table_of("lease", "scheduler", "for", "state", "reserved", "price", "expires in", "job")
    for one in given.leases:
        add_row(
            table,
            one.lease[:8],
            named_peer(one.scheduler, one.name),
            f"{one.kind} ({one.executor})",
            one.state,
            _resources(one.resources),
            f"{one.price:g}",
            f"{one.expires_in_s:.0f} s",
            one.job,
        )
    print_table(table)


def _show_held(job: JobSnapshot, json_: bool) -> None:
    if json_:
        print_json(job.held)
        return
    print(legible(f"job {job.name} holds {len(job.held)} leases"))
    table = table_of("lease", "worker", "for", "state", "reserved", "price", "expires in")
    for one in job.held:
        leaves = "" if one.leaves_in_s is None else f"leaves in {one.leaves_in_s:.0f} s"
        add_row(
            table,
            one.lease[:8],
            named_peer(one.peer, one.name),
            one.kind,
            leaves or ("unreachable" if one.suspected else "held"),
            _resources(one),
            f"{one.price:g}",
            f"{one.expires_in_s:.0f} s",
        )
    print_table(table)


def _resources(of: Resources | LeaseSnapshot) -> str:
    amounts = {name: getattr(of, name) for name in Resources.__struct_fields__}
    return " ".join(f"{name}={amount:g}" for name, amount in amounts.items() if amount) or "nothing"

"""``hypha peers`` and ``hypha lookup``: who is in the network, and where.

The network is asked with the certificate of any component's configuration, as a guest beside the node that
may run with it. A gateway does not dial itself: it is asked over its local HTTP.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import httpx
import msgspec
import trio
import typer
from rich.console import Console
from rich.table import Table

from hypha.cli.component import HTTP_PORTS
from hypha.cli.job.live import shown
from hypha.cli.options import DEFAULT_CONFIG, ConfigOption
from hypha.decoding import decode_json
from hypha.errors import ConfigError, HyphaError, NetworkError, PeerUnreachable, RequestTimeout, Undecodable
from hypha.messages import ListedPeer, ListPeers, PeerList, PeerRef
from hypha.naming import shown as named_peer

if TYPE_CHECKING:
    from hypha.config.models import NodeConfig
    from hypha.net import Libp2pNode

T = TypeVar("T")

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Seconds.", min=0.1)]

_HTTP_S = 5.0
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
    found: dict[str, PeerList] = {}
    if not _gateways(loaded):
        address = loaded.http_address or f"127.0.0.1:{HTTP_PORTS['gateway']}"
        found[address] = ask_local(address, "peers", PeerList)
    else:

        async def ask(node: Libp2pNode) -> None:
            found.update(await _each_gateway(node, loaded, ListPeers()))

        _as_guest(loaded, "hypha-peers", timeout_s, ask)
    if json_:
        print_json(found)
        return
    for gateway, listed in found.items():
        print(f"{len(listed.peers) + listed.more} nodes are connected with {_gateway_in_words(gateway)}")
        table = table_of("node", "roles", "organisation", "connected", "round trip", "PeerID")
        for one in listed.peers:
            add_row(table, _peer_row(one))
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
    found: list[FoundPeer] = []
    by_id = _PEER_ID.fullmatch(what) is not None

    async def ask(node: Libp2pNode) -> None:
        candidates = await (_find_peer(node, loaded, what) if by_id else _find_dataset(node, what))
        for one in candidates:
            found.append(await _try(node, one, timeout_s / 2.0))

    _as_guest(loaded, "hypha-lookup", timeout_s * 2.0, ask)
    if json_:
        print_json(found)
    for one in found if not json_ else ():
        roles = " and ".join(one.roles) or "node"
        organization = f" of {one.organization}" if one.organization else ""
        print(shown(f"{roles} {named_peer(one.peer, one.name)}{organization}, /p2p/{one.peer}").plain)
        for address in one.addresses:
            print(shown(f"  at {address}").plain)
        for gateway in one.gateways:
            print(shown(f"  connected with gateway {gateway}").plain)
        trip = f", round trip {one.round_trip_s * 1000:.1f} ms" if one.round_trip_s is not None else ""
        print(shown(f"  {f'reached {one.reached}{trip}' if one.reached else one.problem}").plain)
    if not found:
        raise HyphaError(
            f"no gateway is connected with {what}: it does not run, or has no way to a gateway"
            if by_id
            else f"no data node announces a dataset called {what!r}: compare the name with a data node's log"
        )


# --- asking ---------------------------------------------------------------------------------------------


def any_component(path: Path | None) -> NodeConfig:
    """The configuration at ``path`` (``config.toml``), whichever component's it is. Raises ConfigError: of
    the component that fits best.
    """
    from hypha.config.models import COMPONENTS
    from hypha.config.reading.loading import load_config

    path = path or DEFAULT_CONFIG
    if not path.exists():
        raise ConfigError(f"there is no {path}: name the configuration of a component with --config")
    problems: list[ConfigError] = []
    for model in COMPONENTS.values():
        try:
            return load_config(model, path)
        except ConfigError as exc:
            problems.append(exc)
    raise min(problems, key=lambda one: len(one.problems))


def _gateways(config: NodeConfig) -> tuple[str, ...]:
    return tuple(getattr(config, "gateway_addresses", ()))


def _as_guest(
    config: NodeConfig, component: str, timeout_s: float, ask: Callable[[Libp2pNode], Awaitable[None]]
) -> None:
    """Have ``ask`` use a node with the certificate of ``config``. Raises NetworkError."""
    from hypha.cli.running import run_until_signal
    from hypha.config.reading.log_filter import parse_filter
    from hypha.net import NodeOptions, open_node
    from hypha.pki.identity import IdentityFiles, load_identity
    from hypha.telemetry.logs import configure_logging

    configure_logging(component, parse_filter("error"), "text")
    identity = load_identity(
        IdentityFiles(config.cert_pem, config.key_pem, config.trust_pem, config.crls_pem)
    )
    options = NodeOptions(
        identity=identity,
        component=component,
        listen=(),
        gateways=_gateways(config),
        guest=True,
        reserve=False,
        exclude_cidr=tuple(config.exclude_cidr),
    )

    async def run() -> int:
        with trio.move_on_after(timeout_s) as scope:
            async with open_node(options) as node:
                await node.wait_connected()
                await ask(node)
                # that we hang up now is no news
                logging.getLogger("hypha.net").setLevel(logging.CRITICAL)
        if scope.cancelled_caught:
            raise RequestTimeout(", ".join(options.gateways), "a look-up", timeout_s)
        return 0

    if (code := run_until_signal(run)) != 0:
        raise typer.Exit(code)


async def _each_gateway(node: Libp2pNode, config: NodeConfig, request: ListPeers) -> dict[str, PeerList]:
    """The answer of each gateway, by its PeerID; of one that cannot be reached, standard error tells.
    Raises NetworkError when none answers.
    """
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
    return [
        FoundPeer(
            peer,
            one.name,
            one.organization,
            one.roles,
            tuple(addresses),
            tuple(gateway for gateway, _ in listed),
        )
    ]


async def _find_dataset(node: Libp2pNode, name: str) -> list[FoundPeer]:
    return [FoundPeer(one.peer, addresses=one.addresses) for one in await node.find_providers(name)]


async def _try(node: Libp2pNode, found: FoundPeer, timeout_s: float) -> FoundPeer:
    """Connect with it, and note what its certificate says, and by which way it was reached."""
    from hypha.messages import Health

    if found.peer == node.peer_id:
        return msgspec.structs.replace(found, problem="it has the very certificate that this asks with")
    try:
        with trio.fail_after(timeout_s):
            asked = trio.current_time()
            relayed = tuple(f"{gateway}/p2p-circuit/p2p/{found.peer}" for gateway in _ways(node))
            node.learn(PeerRef(peer=found.peer, addresses=(*found.addresses, *relayed)))
            await node.connect(found.peer)
            asked = trio.current_time()
            await node.request(found.peer, Health(), timeout_s)
            took_s = trio.current_time() - asked
    except trio.TooSlowError:
        return msgspec.structs.replace(
            found, problem=f"it cannot be reached from here within {timeout_s:g} s"
        )
    except PeerUnreachable as exc:
        return msgspec.structs.replace(found, problem=f"it cannot be reached from here: {exc}")
    except NetworkError as exc:
        return msgspec.structs.replace(found, problem=f"it answers no question: {exc}")
    of_it = next((one for one in node.connections() if one.peer == found.peer), None)
    if of_it is None:
        return msgspec.structs.replace(found, problem="it hung up")
    way = "directly" if of_it.kind == "direct" else "through a relay"
    return msgspec.structs.replace(
        found,
        name=of_it.name,
        organization=of_it.organization,
        roles=tuple(sorted(of_it.roles)),
        reached=way,
        round_trip_s=took_s,
    )


def _ways(node: Libp2pNode) -> list[str]:
    """Addresses of the connected gateways, as a circuit begins with them."""
    return [
        f"{one.address}/p2p/{one.peer}"
        for one in node.connections()
        if "gateway" in one.roles and one.kind == "direct" and one.address
    ]


class NotThere(HyphaError):
    """An address answers, and has no such path."""


def ask_local(address: str, path: str, kind: type[T]) -> T:
    """What a node answers over its local HTTP at ``address``. Raises HyphaError: :class:`NotThere` for a path
    that it does not have.
    """
    url = f"{address if '://' in address else f'http://{address}'}".rstrip("/") + f"/{path}"
    try:
        answer = httpx.get(url, timeout=_HTTP_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise HyphaError(
            f"{url} does not answer: {exc}; is that the http_address of a running node?"
        ) from exc
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise NotThere(f"{url} is not there: is that the address of another component, or an older one?")
    if answer.status_code != httpx.codes.OK:
        raise HyphaError(f"{url} answers with HTTP status {answer.status_code}: {answer.text.strip()[:200]}")
    try:
        return decode_json(answer.content, kind)
    except Undecodable as exc:
        raise HyphaError(f"{url} is not what this version reads: {exc}") from exc


# --- printing -------------------------------------------------------------------------------------------


def _gateway_in_words(gateway: str) -> str:
    return f"gateway /p2p/{gateway}" if _PEER_ID.fullmatch(gateway) else f"the gateway at {gateway}"


def _peer_row(one: ListedPeer) -> tuple[str, ...]:
    trip = "" if one.round_trip_s is None else f"{one.round_trip_s * 1000:.1f} ms"
    return (
        named_peer(one.peer, one.name),
        " ".join(one.roles),
        one.organization,
        "directly" if one.way == "direct" else "through a relay",
        trip,
        one.peer,
    )


def table_of(*columns: str) -> Table:
    """An empty one."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def add_row(table: Table, row: tuple[str, ...]) -> None:
    """What peers have written is shown as it is."""
    table.add_row(*(shown(cell) for cell in row))


def print_table(table: Table) -> None:
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(table)


def print_json(value: object) -> None:
    """For programs."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())

"""``probe``: dial a node, check who it is, ask how it is, and print that: one line says what is
there, more lines how it is. Where nothing can be said of it, one line on standard error says why.
"""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass

import trio
from rich.console import Console
from rich.table import Table

from hypha.cli.asking import as_guest, ask_health
from hypha.cli.printing import shown
from hypha.errors import ConfigError, NetworkError, PeerUnreachable
from hypha.features import in_words, kind_of, missing_services, printable, stated
from hypha.messages import HealthReport, PeerRef
from hypha.naming import shown as named_peer
from hypha.net import ConnectionInfo, Libp2pNode, NodeOptions
from hypha.net.peers.addresses import parse
from hypha.net.peers.reasons import root_of
from hypha.pki.identity import Identity

#: between two looks at an address where nothing listens yet
_PAUSE_S = 0.25


@dataclass(frozen=True)
class Found:
    """What is at an address, by its answer and by its certificate, as the ``connection`` has it."""

    report: HealthReport
    connection: ConnectionInfo | None = None
    round_trip_s: float = 0.0


def probe_node(address: str, identity: Identity, timeout_s: float) -> int:
    """Print what the node at ``address`` is and how it is; 0 when it is well, else 1.

    Raises NetworkError when it cannot be reached or will not answer, ConfigError for a bad address.
    """
    try:
        known = parse(address)
    except ValueError as exc:
        raise ConfigError(str(exc)) from exc
    options = NodeOptions(identity=identity, component="hypha-probe", listen=(), reserve=False, guest=True)

    async def ask(node: Libp2pNode) -> Found:
        # without a PeerID: whoever answers there with a certificate that is trusted
        peer = known.peer or await _who_is_at(node, address, trio.current_time() + timeout_s - _PAUSE_S)
        if peer == identity.peer_id:
            raise PeerUnreachable(
                peer,
                "that is the PeerID of the very certificate this probe uses, and a node does not dial "
                "itself; probe with another node's certificate",
            )
        node.learn(PeerRef(peer=peer, addresses=(address,)))
        await node.connect(peer)
        report, took_s, connection = await ask_health(node, peer, timeout_s)
        if not isinstance(report, HealthReport):
            raise NetworkError(f"{address} answered a health check with {type(report).__name__}")
        return Found(report, connection, took_s)

    found = as_guest(options, timeout_s, address, "its health check", ask)
    show_report(address, found)
    return 0 if found.report.healthy else 1


async def _who_is_at(node: Libp2pNode, address: str, deadline: float) -> str:
    """As the node's, but one that is only starting is waited for: nothing listens there yet."""
    while True:
        try:
            return await node.who_is_at(address)
        except NetworkError as exc:
            starting = getattr(root_of(exc), "errno", None) == errno.ECONNREFUSED
            if not starting or trio.current_time() + _PAUSE_S > deadline:
                raise
        await trio.sleep(_PAUSE_S)


def summary(found: Found) -> str:
    """``gateway gw-1 (...wTqXNUgL) of Example, hypha-gateway 1.0, round trip 3.1 ms: healthy``."""
    report, of_it = found.report, found.connection
    roles = " and ".join(sorted(of_it.roles) if of_it else ()) or "node of any role"
    organization = f" of {of_it.organization}" if of_it and of_it.organization else ""
    version = f"{report.component} {report.version}".strip()
    health = "healthy" if report.healthy else "NOT HEALTHY"
    who = named_peer(report.peer, of_it.name if of_it else "")
    return f"{roles} {who}{organization}, {version}, round trip {found.round_trip_s * 1000:.1f} ms: {health}"


def show_report(address: str, found: Found) -> None:
    """Print what the node at ``address`` is, and what it says of its health."""
    _print(summary(found), address, found.report)


def show_health(address: str, report: HealthReport) -> None:
    """Print what the node whose local HTTP is at ``address`` says of its health."""
    health = "healthy" if report.healthy else "NOT HEALTHY"
    _print(f"{report.component} {report.version}: {health}", address, report)


def _print(first: str, address: str, report: HealthReport) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {"address": address, "peer": report.peer, "up": f"{report.uptime_s:.0f} s", **report.details}
    if report.features:
        rows["features"] = ", ".join(map(printable, report.features))
    if lacking := missing_services(kind_of(report.component), stated(report)):
        rows["lacks"] = in_words(lacking)
    for name, value in rows.items():
        table.add_row(shown(name), shown(value))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(shown(first), soft_wrap=True)
    console.print(table)

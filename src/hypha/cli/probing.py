"""``probe``: dial a node, check who it is, ask how it is, and print that."""

from __future__ import annotations

import logging
import sys

import trio
from rich.console import Console
from rich.table import Table

from hypha.cli.live import shown
from hypha.cli.running import run_until_signal
from hypha.config.log_filter import parse_filter
from hypha.errors import NetworkError, PeerUnreachable, RequestTimeout
from hypha.messages import Health, HealthReport, PeerRef
from hypha.net import NodeOptions, open_node
from hypha.pki.identity import Identity
from hypha.telemetry.logs import configure_logging


def probe_node(address: str, identity: Identity, timeout_s: float) -> int:
    """Print the health report of the node at ``address``; 0 when it is well, else 1.

    Raises NetworkError when it cannot be reached or will not answer, ConfigError for a bad address.
    """
    configure_logging("hypha-probe", parse_filter("warn"), "text")
    reports: list[HealthReport] = []

    async def ask() -> int:
        with trio.move_on_after(timeout_s) as scope:
            reports.append(await _ask(address, identity, timeout_s))
        if scope.cancelled_caught:
            raise RequestTimeout(address, "its health check", timeout_s)
        return 0

    code = run_until_signal(ask)
    if not reports:
        return code
    show_report(address, reports[0])
    return 0 if reports[0].healthy else 1


async def _ask(address: str, identity: Identity, timeout_s: float) -> HealthReport:
    before, _, peer = address.rpartition("/p2p/")
    options = NodeOptions(
        identity=identity,
        component="hypha-probe",
        listen=(),
        # without a PeerID: whoever answers there with a certificate we trust
        gateways=() if before else (address,),
        reserve=False,
    )
    async with open_node(options) as node:
        if not before:
            await node.wait_connected()
            peer = node.gateway or ""
        elif peer == identity.peer_id:
            raise PeerUnreachable(
                peer,
                "that is the PeerID of the very certificate this probe uses, and a node does not dial "
                "itself; probe with another node's certificate",
            )
        else:
            node.learn(PeerRef(peer=peer, addresses=(address,)))
        report = await node.request(peer, Health(), timeout_s)
        # that we hang up now is no news
        logging.getLogger("hypha.net").setLevel(logging.ERROR)
    if not isinstance(report, HealthReport):
        raise NetworkError(f"{address} answered a health check with {type(report).__name__}")
    return report


def show_report(address: str, report: HealthReport) -> None:
    """Print what the node at ``address`` says of its health."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "address": address,
        "health": "healthy" if report.healthy else "NOT HEALTHY",
        "component": f"{report.component} {report.version}",
        "peer": report.peer,
        "up": f"{report.uptime_s:.0f} s",
        **report.details,
    }
    for name, value in rows.items():
        table.add_row(shown(name), shown(value))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False).print(table)

"""The node itself: whose the ports are that it is to listen on, and, where it runs, what its local HTTP says:
the job's goodput, and what its metrics count.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from hypha.cli.asking import ask_local, get_local, local_health
from hypha.cli.doctor.gathered import Port, Running
from hypha.cli.doctor.gathering import at_once
from hypha.config.models import NodeConfig
from hypha.decoding import decode
from hypha.errors import HyphaError, NetworkError, Undecodable
from hypha.messages import HealthReport
from hypha.net.peers.addresses import host_and_port
from hypha.runtime import in_thread
from hypha.scheduler.status.snapshot import JobSnapshot

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def free_ports(config: NodeConfig) -> list[Port]:
    """Those of ``config`` that have a number: ``free``, ``other`` (in use) or ``foreign``."""
    found = []
    for address in config.listen_addresses:
        host, number = host_and_port(address)
        if number:
            found.append(_try("listen_addresses", address, host, number))
    if config.http_address is not None:
        host, _, port = config.http_address.rpartition(":")
        if int(port):
            found.append(_try("http_address", config.http_address, host.strip("[]"), int(port)))
    return found


def _try(key: str, address: str, host: str, port: int) -> Port:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
            # two may be bound to one port that reuse it, and only one may listen
            tried.listen(1)
        except socket.gaierror as exc:
            return Port(key, address, "foreign", f"{host} has no address here ({exc.strerror})")
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                return Port(key, address, "other")
            if exc.errno == errno.EADDRNOTAVAIL:
                return Port(key, address, "foreign", f"{host} is no address of this machine")
            return Port(key, address, "foreign", exc.strerror or str(exc))
    return Port(key, address, "free")


async def owned(
    ports: list[Port], own_peer: str, who_is_at: Callable[[str], Awaitable[str]]
) -> tuple[Port, ...]:
    """``ports`` with those that are ``own``: a node with the PeerID ``own_peer`` answers there."""
    return tuple(await at_once(*(partial(_owner, port, own_peer, who_is_at) for port in ports)))


async def _owner(port: Port, own_peer: str, who_is_at: Callable[[str], Awaitable[str]]) -> Port:
    if port.state != "other":
        return port
    peer, why = "", ""
    if port.key == "http_address":
        report = await ask_health(port.address)
        peer = report.peer if report is not None else ""
        why = "what listens there is no node of Hypha"
    else:
        host, number = host_and_port(port.address)
        here = _ANY.get(host, host)
        try:
            peer = await who_is_at(f"/{'ip6' if ':' in here else 'ip4'}/{here}/tcp/{number}")
        except NetworkError as exc:
            why = str(exc).partition(": ")[2] or str(exc)
    if peer == own_peer:
        return Port(port.key, port.address, "own")
    return Port(port.key, port.address, "other", f"the node {peer} listens there" if peer else why)


async def ask_health(address: str) -> HealthReport | None:
    """What the local HTTP at ``host:port`` says of its node."""
    try:
        return await in_thread(local_health, address, abandon_on_cancel=True)
    except HyphaError:
        return None


def read_running(http_address: str, scheduler: bool) -> Running:
    """Empty where it says nothing. Blocks."""
    badput: dict[str, float] = {}
    with suppress(HyphaError):
        if scheduler:
            badput = shares_in(ask_local(http_address, "status", JobSnapshot))
    with suppress(HyphaError):
        _, answer = get_local(http_address, "metrics")
        if answer.is_success:
            return counted(badput, answer.content)
    return Running(badput)


def shares_in(job: JobSnapshot) -> dict[str, float]:
    """Of all worker seconds of a job, by what they went to."""
    goodput = job.goodput
    if goodput is None or goodput.places * goodput.wall_s <= 0:
        return {}
    whole_s = goodput.places * goodput.wall_s
    return {reason: spent_s / whole_s for reason, spent_s in goodput.badput_s.items()}


def counted(badput: dict[str, float], metrics: bytes) -> Running:
    """What the text of ``/metrics`` counts."""
    try:
        families = decode(
            lambda text: [*text_string_to_metric_families(text)], metrics.decode(errors="replace")
        )
    except Undecodable:
        families = []
    samples = [sample for family in families for sample in family.samples]

    def total(name: str, **labels: str) -> float:
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())

    fetches = total("hypha_data_fetch_duration_count")
    seconds = total("hypha_data_fetch_duration_sum")
    return Running(
        badput=badput,
        renewals=int(total("hypha_lease_renewals_total")),
        failed_renewals=int(total("hypha_lease_renewals_total", status="failure")),
        fetches=int(fetches),
        failed_fetches=int(total("hypha_data_fetch_duration_count", status="failure")),
        mean_fetch_s=seconds / fetches if fetches else None,
        announcements=int(
            total("hypha_dht_queries_total", side="client", operation="provide", status="success")
        ),
        requests=_by_outcome(samples, "hypha_worker_offers_total"),
        offers=_by_outcome(samples, "hypha_scheduler_offers_total"),
        training=int(total("hypha_worker_jobs", kind="train")),
        gpu_utilization=tuple(one.value for one in samples if one.name == "hypha_worker_gpu_utilization"),
    )


def _by_outcome(samples: Iterable[Sample], name: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one in samples:
        if one.name == name and one.value > 0:
            found[one.labels.get("outcome", "other")] += int(one.value)
    return dict(found)

"""The node itself: whose the ports are that it is to listen on, and, where it runs, what its local HTTP says:
the job's goodput, and what its metrics count.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

import httpx
import trio
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from hypha.cli.doctor.gathered import Port, Running
from hypha.config.models import NodeConfig
from hypha.decoding import decode, decode_json
from hypha.errors import NetworkError, Undecodable
from hypha.messages import HealthReport
from hypha.net.peers.addresses import host_and_port
from hypha.scheduler.status.snapshot import JobSnapshot

HTTP_S = 3.0
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
    found = list(ports)

    async def look(number: int) -> None:
        found[number] = await _owner(ports[number], own_peer, who_is_at)

    async with trio.open_nursery() as nursery:
        for number, port in enumerate(ports):
            if port.state == "other":
                nursery.start_soon(look, number)
    return tuple(found)


async def _owner(port: Port, own_peer: str, who_is_at: Callable[[str], Awaitable[str]]) -> Port:
    if port.key == "http_address":
        report = await ask_health(port.address)
        peer, why = (
            (report.peer, "") if report is not None else ("", "what listens there is no node of Hypha")
        )
    else:
        host, number = host_and_port(port.address)
        here = _ANY.get(host, host)
        try:
            peer = await who_is_at(f"/{'ip6' if ':' in here else 'ip4'}/{here}/tcp/{number}")
            why = ""
        except NetworkError as exc:
            peer, why = "", str(exc).partition(": ")[2] or str(exc)
    if peer == own_peer:
        return Port(port.key, port.address, "own")
    return Port(port.key, port.address, "other", why or f"the node {peer} listens there")


async def ask_health(address: str) -> HealthReport | None:
    """What the local HTTP at ``host:port`` says of its node."""
    body = await ask_http(address, "/health")
    if body is None:
        return None
    try:
        return decode_json(body, HealthReport)
    except Undecodable:
        return None


async def ask_http(address: str, path: str) -> bytes | None:
    """The body of ``GET path``, whatever its status; None where nobody answers in time."""
    host, _, port = address.rpartition(":")
    here = _ANY.get(host.strip("[]"), host)
    try:
        async with httpx.AsyncClient(timeout=HTTP_S, trust_env=False) as client:
            answer = await client.get(f"http://{here}:{port}{path}")
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
    return answer.content if answer.status_code in (200, 503) else None


async def gather_running(http_address: str, scheduler: bool) -> Running:
    """Empty where it says nothing."""
    badput: dict[str, float] = {}
    if scheduler and (body := await ask_http(http_address, "/status")) is not None:
        badput = shares_in(body)
    body = await ask_http(http_address, "/metrics")
    return Running(badput) if body is None else counted(badput, body)


def shares_in(status: bytes) -> dict[str, float]:
    """Of all worker seconds of a job, by what they went to."""
    try:
        goodput = decode_json(status, JobSnapshot).goodput
    except Undecodable:
        return {}
    if goodput is None or goodput.places * goodput.wall_s <= 0:
        return {}
    whole_s = goodput.places * goodput.wall_s
    return {reason: spent_s / whole_s for reason, spent_s in goodput.badput_s.items()}


def counted(badput: dict[str, float], metrics: bytes) -> Running:
    """What the text of ``/metrics`` counts."""
    try:
        samples = decode(_samples, metrics.decode(errors="replace"))
    except Undecodable:
        samples = []

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


def _samples(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def _by_outcome(samples: Iterable[Sample], name: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for one in samples:
        if one.name == name and one.value > 0:
            found[one.labels.get("outcome", "other")] += int(one.value)
    return dict(found)

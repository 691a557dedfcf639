"""Gateways and peers: who is there, how far, how fast, and what they see of this node."""

from __future__ import annotations

import math
import socket
from dataclasses import replace

import trio

from hypha.access import SERVICES, carries, may_act_as
from hypha.cli.doctor.gathered import Contact, Dialled, Failure
from hypha.cli.doctor.gathering import Gathering, readable
from hypha.errors import NetworkError, Refused, RequestTimeout
from hypha.messages import (
    MAX_DIALLED_BACK,
    MAX_MEASURED_BYTES,
    DialBack,
    DialedBack,
    Health,
    HealthReport,
    MeasureBandwidth,
)
from hypha.net import Libp2pNode
from hypha.net.peers.addresses import Address, host_and_port, parse
from hypha.net.peers.reasons import NO_HYPHA_NODE, failure_of
from hypha.runtime import wall_time

#: a whole contact takes no longer
CONTACT_S = 45.0
NAME_S = 5.0
#: small requests in a row, and how long each is waited for
REQUESTS, REQUEST_S = 15, 2.0
#: a row whose round trips differ by so much is tried again
UNEVEN_S = 0.2
#: bytes a second; with less it is tried again
DOUBTFUL = 0.25e6
#: what is measured grows while it is quick; one request is waited for so long
SIZES, SIZE_S, QUICK_S = (16 << 10, 128 << 10, MAX_MEASURED_BYTES), 10.0, 1.5
#: the largest is sent so often, where it is quick
REPEATS, ATTEMPTS = 4, 2
#: <linux/in.h> and <linux/in6.h>; Python has no names for them
_IP_MTU, _IPV6_MTU = 14, 24


async def look_at(node: Libp2pNode, gathering: Gathering, address: str, gateway: bool = False) -> Contact:
    """Whoever is at ``address``, or has that PeerID; a ``gateway`` has to prove that it is one."""
    found = await gathering.within(CONTACT_S, address, lambda: _look_at(node, gathering, address, gateway))
    return found or Contact(address, failure="unreachable", reason=f"no end within {CONTACT_S:g} s")


class _NotMet(Exception):
    """Why nobody can be asked there."""

    def __init__(self, failure: Failure, reason: str, peer: str = "") -> None:
        self.failure, self.reason, self.peer = failure, reason, peer


async def _look_at(node: Libp2pNode, gathering: Gathering, address: str, gateway: bool) -> Contact:
    contact, known = Contact(address), None
    try:
        if address.startswith("/"):
            try:
                known = parse(address)
            except ValueError as exc:
                raise _NotMet("other", str(exc)) from exc
            contact = replace(contact, peer=await _meet(node, known, address))
        else:
            contact = replace(contact, peer=address)
            await _connect(node, address)
    except _NotMet as exc:
        return replace(contact, peer=exc.peer, failure=exc.failure, reason=exc.reason)
    if of_it := [one for one in node.connections() if one.peer == contact.peer]:
        # what its certificate says, and the way that leads to it
        relayed = all(one.kind == "relayed" for one in of_it)
        contact = replace(contact, name=of_it[0].name, roles=of_it[0].roles, relayed=relayed)
    if gateway and not may_act_as(contact.roles, SERVICES["gateway"].by):
        reason = f"the node there is no gateway: its certificate carries {carries(contact.roles)}"
        return replace(contact, failure="other", reason=reason)
    contact = await _ask(node, contact)
    if contact.failure is not None:
        return contact
    contact = await _measure(node, gathering, contact)
    return contact if known is None else replace(contact, mtu=await _path_mtu(known))


async def _connect(node: Libp2pNode, peer: str, at: str = "") -> None:
    try:
        await node.connect(peer)
    except NetworkError as exc:
        # who refuses this node's certificate sends the refusal after the handshake
        reason = readable(getattr(exc, "reason", "") or str(exc))
        refused = "certificate" in reason or "refuses" in reason
        raise _NotMet("trust" if refused else "unreachable", reason.removeprefix(at), peer) from exc


async def _meet(node: Libp2pNode, known: Address, address: str) -> str:
    """The PeerID of who is there and connected now."""
    host, port = host_and_port(address)
    try:
        with trio.fail_after(NAME_S):
            await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except trio.TooSlowError as exc:
        raise _NotMet("name", f"no answer to what address its name has, for {NAME_S:g} s") from exc
    except (OSError, UnicodeError) as exc:
        words = getattr(exc, "strerror", None) or exc
        raise _NotMet("name", f"{host} has no address here ({words})") from exc
    at = f"{known.transport}: "
    try:
        peer = await node.who_is_at(address)
    except NetworkError as exc:
        reason = str(exc).removeprefix(at)
        failure: Failure = "trust" if failure_of(exc) == "certificate" else "unreachable"
        raise _NotMet("other" if NO_HYPHA_NODE in reason else failure, readable(reason)) from exc
    if known.peer not in (None, peer):
        raise _NotMet("other", f"{peer} is there, and not who the address names", peer)
    if peer == node.peer_id:
        raise _NotMet("other", "that is this very node", peer)
    node.remember(str(Address(known.transport, peer)))
    await _connect(node, peer, at)
    return peer


async def _ask(node: Libp2pNode, contact: Contact) -> Contact:
    """A row of small requests: how it is, what time it has, and how steady the way to it is."""
    row = await _row(node, contact)
    if row.failure is None and _is_uneven(row):
        # a moment's hiccup is no fault: the better one of two rows counts
        again = await _row(node, contact)
        if again.failure is None and not _is_uneven(again):
            return again
    return row


def _is_uneven(contact: Contact) -> bool:
    trips = contact.round_trips_s
    return not max(trips) < min(trips) + UNEVEN_S


async def _row(node: Libp2pNode, contact: Contact) -> Contact:
    trips: list[float] = []
    clocks: list[tuple[float, float]] = []
    report: HealthReport | None = None
    reason = ""
    late_s = 0.0

    async def watch() -> None:
        """By how much this process was late: what others were is not to be told from that."""
        nonlocal late_s
        while True:
            due = trio.current_time() + 0.02
            await trio.sleep_until(due)
            late_s = max(late_s, trio.current_time() - due)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for _ in range(REQUESTS):
            began, wall_s = trio.current_time(), wall_time()
            try:
                answer = await node.request(contact.peer, Health(), REQUEST_S)
            except NetworkError as exc:
                trips.append(math.inf)
                reason = str(exc)
                if len(trips) == 3 and report is None:
                    break
                continue
            took_s = trio.current_time() - began
            trips.append(took_s)
            if isinstance(answer, HealthReport):
                report = answer
                if answer.time_s is not None:
                    clocks.append((took_s, answer.time_s - (wall_s + took_s / 2)))
        nursery.cancel_scope.cancel()
    if report is None:
        return replace(contact, failure="unreachable", reason=readable(reason or "it says nothing of itself"))
    return replace(
        contact,
        component=readable(report.component),
        healthy=report.healthy,
        details={readable(key): readable(value) for key, value in report.details.items()},
        packages={readable(key): readable(value) for key, value in report.packages.items()},
        seen_at=tuple(map(readable, report.seen_at)),
        # of the quickest answer, which says it most exactly
        clock_s=min(clocks)[1] if clocks else None,
        round_trips_s=tuple(trips),
        late_s=late_s,
    )


async def _measure(node: Libp2pNode, gathering: Gathering, contact: Contact) -> Contact:
    """Bytes a second, each way; what goes through at least, as one stream carries it."""
    usual_s = min(contact.round_trips_s)
    rates: list[float | None] = []
    try:
        for up in (True, False):
            rates.append(await _rate(node, contact.peer, up, usual_s))
    except RequestTimeout:
        return replace(contact, stalled=True)
    except Refused as exc:
        if exc.code not in ("malformed", "unsupported"):  # it is older than this request, which is no fault
            gathering.note(f"how fast the way to {contact.called} is", exc.reason)
    except NetworkError as exc:
        gathering.note(f"how fast the way to {contact.called} is", str(exc))
    up_rate, down_rate = (*rates, None, None)[:2]
    return replace(contact, up=up_rate, down=down_rate)


async def _rate(node: Libp2pNode, peer: str, up: bool, usual_s: float) -> float:
    """Raises NetworkError."""
    best = 0.0
    for _ in range(ATTEMPTS):
        for size in (*SIZES, *SIZES[-1:] * (REPEATS - 1)):
            request = MeasureBandwidth(payload=bytes(size)) if up else MeasureBandwidth(reply_bytes=size)
            began = trio.current_time()
            await node.request(peer, request, SIZE_S)
            took_s = trio.current_time() - began
            # what a small request takes is no bandwidth, and is not always the same
            best = max(best, size / max(took_s - usual_s, took_s / 2))
            if took_s > QUICK_S:
                break
        if best > DOUBTFUL:
            break
    return best


async def _path_mtu(address: Address) -> int | None:
    """What the kernel knows of the path, by its interface and from routers; nothing is sent for it."""
    host, port = host_and_port(address.transport)
    with trio.move_on_after(NAME_S):
        try:
            places = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            family, kind, *_, place = places[0]
            with socket.socket(family, kind) as asking:
                asking.connect(place)
                if family == socket.AF_INET6:
                    return asking.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)
                return asking.getsockopt(socket.IPPROTO_IP, _IP_MTU)
        except OSError:
            return None
    return None


async def dial_back(
    node: Libp2pNode, gathering: Gathering, gateway: Contact, addresses: list[str]
) -> list[Dialled]:
    """Whether ``gateway`` can dial this node at ``addresses``."""
    try:
        answer = await node.request(
            gateway.peer, DialBack(addresses=tuple(addresses[:MAX_DIALLED_BACK])), 2 * REQUEST_S + 10.0
        )
    except NetworkError as exc:
        if not (isinstance(exc, Refused) and exc.code in ("malformed", "unsupported")):
            gathering.note(f"whether {gateway.called} can dial this node", str(exc))
        return []
    if not isinstance(answer, DialedBack):
        return []
    found = []
    for one in answer.results:
        reason = readable(one.reason)
        if not reason and one.peer != node.peer_id:
            reason = f"{readable(one.peer)} is there, which is another node"
        found.append(
            Dialled(readable(one.address), gateway.called, reason, not reason.startswith("not tried"))
        )
    return found

"""The way to gateways and peers, and from them to here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Check, Finding, Severity
from hypha.cli.doctor.gathered import (
    Contact,
    Dialled,
    Failure,
    MachineObservations,
    NetworkObservations,
    Port,
)
from hypha.config.models import NodeConfig, WorkerConfig

MBIT = 10**6 / 8
#: bytes a second
LOW_BANDWIDTH = 1.0 * MBIT
#: as the alert ClockSkew; certificates are refused far sooner than after the second
SKEW_S, GREAT_SKEW_S = 10.0, 300.0
#: a lost packet is sent again after 0.2 s at least (the kernel's TCP_RTO_MIN)
LATE_S = 0.2
#: of the round trips so many must be late, and this process not
LATE_SHARE = 0.15
#: with a process that was held up by so much nothing can be judged
TOO_LATE_S = 0.1
#: of what a limit allows, the share at which it is what bounds
AT_ITS_LIMIT = 0.7
#: over less than this buffers bound nothing, and what is measured is the machine
FAR_S = 0.02
LEAST_MTU = 1280
FULL = 0.9
_FAILURES: dict[Failure, Check] = {
    "name": checks.GATEWAY_NAME,
    "unreachable": checks.GATEWAY_UNREACHABLE,
    "other": checks.GATEWAY_OTHER,
    "trust": checks.GATEWAY_TRUST,
}
#: of a gateway's health: what is taken, and what there is
_PLACES = (
    ("connections", "max_connections"),
    ("circuits", "max_circuits"),
    ("reservations", "max_reservations"),
)


def judge_network(
    observed: NetworkObservations, machine: MachineObservations, config: NodeConfig, line: float | None = None
) -> Iterator[Finding]:
    """All of it; ``line`` is what the line can carry, in bytes a second, where the caller states it."""
    for port in observed.ports:
        yield from _port(port)
    reached = any(one.failure is None for one in observed.gateways)
    for gateway in observed.gateways:
        if gateway.failure is None:
            yield from _gateway(gateway)
            continue
        what = f"{gateway.address}: {gateway.reason}"
        host = gateway.address.removeprefix("/").partition("/")[2].partition("/")[0]
        severity: Severity = "warning" if reached else "error"
        yield _FAILURES[gateway.failure].found(what, severity=severity, name=host)
    for peer in observed.peers:
        if peer.failure is not None:
            yield checks.PEER_UNREACHABLE.found(f"{peer.address}: {peer.reason}")
    everybody = (*observed.gateways, *observed.peers, *observed.data_nodes)
    contacts = [one for one in everybody if one.failure is None]
    yield from _clock(contacts)
    yield from _doubles(contacts)
    for contact in contacts:
        yield from _way(contact, machine, line)
    if isinstance(config, WorkerConfig):
        yield from _lease(config, contacts)
    yield from _dialled(observed.dialled, config)


def _port(port: Port) -> Iterator[Finding]:
    number = port.address.rpartition("/")[2].rpartition(":")[2]
    if port.state == "other":
        yield checks.PORT_IN_USE.found(
            f"{port.key} {port.address}: {port.why or 'another process listens there'}",
            port=number,
        )
    elif port.state == "foreign":
        yield checks.PORT_IN_USE.found(
            f"{port.key} {port.address}: {port.why}",
            f"write an address of this machine into {port.key} (`ip -brief address`), or 0.0.0.0",
        )


def _gateway(contact: Contact) -> Iterator[Finding]:
    if not contact.healthy:
        yield checks.GATEWAY_UNWELL.found(f"{contact.called} says that it is not well")
    for taken, there in _PLACES:
        numbers = [contact.details.get(one, "") for one in (taken, there)]
        if all(one.isdigit() for one in numbers) and int(numbers[1]) > 0:
            used, places = map(int, numbers)
            if used >= FULL * places:
                yield checks.GATEWAY_UNWELL.found(
                    f"{contact.called} has {used} of {places} {taken}",
                    f"raise {there} of that gateway, or start another one",
                )


def _doubles(contacts: list[Contact]) -> Iterator[Finding]:
    """The doctor comes from this machine, as a node here does; over IPv4 and IPv6 it has two addresses."""
    for contact in contacts:
        if not contact.seen_at:
            continue
        kind, here = contact.seen_at[-1].split("/")[1:3]
        hosts = {one.split("/")[2] for one in contact.seen_at if one.split("/")[1] == kind}
        if others := sorted(hosts - {here}):
            yield checks.SAME_CERTIFICATE.found(
                f"{contact.called} is connected with a node that has this certificate at "
                f"{', '.join(others)}, and sees this machine at {here}"
            )
            return


def _clock(contacts: list[Contact]) -> Iterator[Finding]:
    """One finding: with several peers that agree it is this clock that is wrong."""
    skews = []
    for contact in contacts:
        if abs(contact.clock_s or 0.0) - (contact.round_trip_s or 0.0) > SKEW_S:
            skews.append((contact.clock_s or 0.0, contact))
    if not skews:
        return
    known = [one for one in contacts if one.clock_s is not None]
    offset_s = median(skew for skew, _ in skews)
    way = "behind" if offset_s > 0 else "ahead of"
    if len(skews) == len(known) > 1:
        who = f"the clocks of all {len(known)} peers that were asked"
    else:
        who = f"that of {', '.join(one.called for _, one in skews)}"
    yield checks.CLOCK_SKEW.found(
        f"this machine's clock is {abs(offset_s):.0f} s {way} {who}",
        severity="error" if abs(offset_s) > GREAT_SKEW_S else "warning",
    )


def _way(contact: Contact, machine: MachineObservations, line: float | None) -> Iterator[Finding]:
    trips = contact.round_trips_s
    if contact.stalled:
        yield checks.LARGE_PACKETS.found(
            f"{contact.called} answers small requests, and one of half a megabyte got no answer"
        )
    elif trips and contact.late_s < TOO_LATE_S:
        usual_s = median(trips)
        late = sum(not one <= usual_s + LATE_S for one in trips)
        if late >= max(2, LATE_SHARE * len(trips)):
            usual = f"{usual_s * 1000:.0f} ms" if math.isfinite(usual_s) else "no answer at all"
            yield checks.NETWORK_UNSTABLE.found(
                f"of {len(trips)} small requests to {contact.called} {late} were lost or late by "
                f"{LATE_S * 1000:g} ms or more (usual: {usual})"
            )
    if contact.mtu is not None and contact.mtu < LEAST_MTU:
        yield checks.SMALL_MTU.found(f"the path to {contact.called} takes packets of {contact.mtu} bytes")
    for what, rate in (("to", contact.up), ("from", contact.down)):
        if rate is not None and rate < LOW_BANDWIDTH and not contact.stalled:
            yield checks.BANDWIDTH_LOW.found(f"{rate / MBIT:.2f} Mbit/s get through {what} {contact.called}")
    yield from _buffers(contact, machine, line)


def _buffers(contact: Contact, machine: MachineObservations, line: float | None) -> Iterator[Finding]:
    """Of a buffer a half holds data, the rest the kernel's own words of it (tcp_adv_win_scale)."""
    trip_s = contact.round_trip_s
    # on this very machine nothing is ever on its way
    here = any(one.startswith(("/ip4/127.", "/ip6/::1/")) for one in (contact.address, *contact.seen_at))
    if here or not trip_s:
        return
    for name, buffer, rate in (
        ("receive", machine.receive_buffer, contact.down),
        ("send", machine.send_buffer, contact.up),
    ):
        if buffer is None:
            continue
        most = buffer / 2 / trip_s
        bounds = line is not None and line > most
        far = trip_s >= FAR_S and line is None
        if bounds or (far and rate is not None and rate >= AT_ITS_LIMIT * most):
            wanted = max(2.0 * buffer, max(line or 0.0, 2 * (rate or 0.0)) * trip_s * 2)
            # the next power of two, as buffers are usually given
            size = 1 << max(0, math.ceil(wanted) - 1).bit_length()
            key = "tcp_rmem" if name == "receive" else "tcp_wmem"
            middle = "87380" if name == "receive" else "65536"
            yield checks.SOCKET_BUFFERS.found(
                f"a {name} buffer of {buffer} bytes carries {most / MBIT:.0f} Mbit/s at most over the "
                f"{trip_s * 1000:.0f} ms to {contact.called}",
                f'`sysctl -w net.ipv4.{key}="4096 {middle} {size}"`',
            )


def _lease(config: WorkerConfig, contacts: list[Contact]) -> Iterator[Finding]:
    """A lease is renewed at three quarters of its duration; what is left must outlast a pause on the way."""
    trips = [one for contact in contacts for one in contact.round_trips_s if math.isfinite(one)]
    # a packet that is sent again, the slowest journey that was seen, and two there and back of the usual ones
    pause_s = 0.5 + max(trips, default=0.0) + 4 * (median(trips) if trips else 0.0)
    if config.offer.lease_s / 4 < pause_s:
        least_s = math.ceil(4 * pause_s)
        yield checks.LEASE_SHORT.found(
            f"offer.lease_s is {config.offer.lease_s:g} s, which leaves {config.offer.lease_s / 4:g} s for a "
            f"renewal; pauses of {pause_s:.1f} s are to be expected here",
            seconds=max(least_s, 30),
        )


def _dialled(dialled: tuple[Dialled, ...], config: NodeConfig) -> Iterator[Finding]:
    by_gateway = [one for one in dialled if one.by and one.tried]
    if by_gateway and all(one.reason for one in by_gateway):
        tried = "; ".join(f"{one.address}: {one.reason}" for one in by_gateway)
        # behind NAT that is how it is, unless the configuration states where the node can be dialled
        yield checks.NOT_DIALABLE.found(
            f"{by_gateway[0].by} cannot dial this node ({tried}), so others reach it through a relay only",
            severity="warning" if config.external_addresses else "note",
        )
        return
    for one in dialled:
        if one.tried and one.reason and (one.external or not one.by):
            who = f"{one.by} cannot dial it" if one.by else "it cannot be dialled from here"
            yield checks.EXTERNAL_ADDRESS.found(f"{one.address}: {who}: {one.reason}")

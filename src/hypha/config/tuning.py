"""``[tuning]``: what was measured to be right for most networks, for those where it is not; and ``[limits]``:
how much of its line a node may use, by the hour where it is wanted, in megabits a second of 10^6 bits.

Each key of ``[tuning]`` says when to turn it; ``docs/tuning.md`` shows all of them in one table, with those
that stand elsewhere. The defaults are those with which Hypha is measured and tested.
"""

from __future__ import annotations

import re
from datetime import time
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hypha.config.section import Section

#: a lease must outlive so many of the longest round trips: it is renewed when three quarters of it are over,
#: and one whole attempt has to fit into the quarter that is left
ROUND_TRIPS_A_LEASE = 4


class GossipTuning(Section):
    """The mesh in which requests for workers are passed on. A leaf has its gateways for neighbours and nobody
    else, so these matter at gateways.
    """

    degree: int = Field(default=128, ge=1, le=4096)
    """neighbours that a node wants (D of gossipsub); lower it at gateways with thousands of leaves and a thin
    line, as every request goes to each neighbour
    """
    degree_low: int = Field(default=1, ge=1, le=4096)
    """with fewer it looks for more; more than 1 leaves the leaves of a lone gateway without a mesh"""
    degree_high: int = Field(default=256, ge=1, le=8192)
    """with more it drops some, who then hear of requests late: above the leaves that one gateway has"""
    heartbeat_s: float = Field(default=1.0, ge=0.1, le=60)
    """seconds between two looks at the mesh; lower finds neighbours sooner and costs each of them a message
    """


class SocketTuning(Section):
    """What the kernel may hold of one connection. A line of B Mbit/s and a round trip of R seconds is full
    with 125 * B * R KB: 1000 Mbit/s over 0.1 s need 12500.
    """

    send_buffer_kb: int | None = Field(default=None, ge=16, le=1 << 20)
    """``None``: the kernel decides and adapts, up to net.ipv4.tcp_wmem (sent) and tcp_rmem (received), which
    suits nearly everybody; raise those first. A number here is fixed, and bounded by net.core.wmem_max
    """
    receive_buffer_kb: int | None = Field(default=None, ge=16, le=1 << 20)
    """the same, bounded by net.core.rmem_max"""


class ConnectionTuning(Section):
    """How much of what peers open is served. More than that is refused, never queued without end."""

    per_peer: int = Field(default=4, ge=2, le=64)
    """connections of one peer; two that dial each other at once have one each"""
    unproven: int = Field(default=256, ge=8, le=65536)
    """connections that have shown no certificate yet, which come on top of max_connections"""
    unproven_per_address: int = Field(default=64, ge=4, le=65536)
    """of these from one address; raise it where more than that many nodes start behind one NAT at once"""
    streams: int = Field(default=256, ge=32, le=256)
    """streams that the other end of a connection may have open (requests, reports, circuits), which opens 256
    itself at most; lower it where memory is short
    """
    requests: int = Field(default=64, ge=8, le=4096)
    """requests served at once beyond the few that each peer has for itself; raise it at a scheduler or data
    node whose peers are told `busy` (hypha_network_streams_refused_total{service="rpc"})
    """
    requests_per_peer: int = Field(default=16, ge=2, le=256)
    """of one peer"""


class GatewayConnectionTuning(ConnectionTuning):
    """How much of what peers open is served. More than that is refused, never queued without end. See also
    max_connections, max_circuits and max_reservations.
    """

    circuits_per_peer: int = Field(default=64, ge=1, le=65536)
    """relayed connections to one node; raise it where more than that many workers reach one parameter server
    or data node through this gateway
    """


class LivenessTuning(Section):
    """How long this node waits for others, in seconds. Shorter notices a dead peer sooner, and takes a slow
    or crowded line for a dead one.
    """

    silence_s: float = Field(default=10.0, ge=1, le=600)
    """a connection over which nothing came for so long is cut; it is asked for a sign of life before. Raise
    it where lines drop out for seconds and come back (satellite, mobile)
    """
    round_trip_s: float = Field(default=0.5, gt=0, le=60)
    """the longest that a request and its answer take here while nothing fails. A worker's offer.lease_s must
    be four times that at least, and offer.temporary_lease_s twice; raise all of them on crowded lines
    """
    dial_s: float = Field(default=5.0, ge=0.5, le=120)
    """one address of a peer is given so long; the next one is tried beside it after a quarter of a second"""
    relay_after_s: float = Field(default=1.0, ge=0, le=60)
    """and a relayed way after so long"""
    reconnect_min_s: float = Field(default=0.5, gt=0, le=60)
    """the first pause between attempts to reach a gateway, doubled each time"""
    reconnect_max_s: float = Field(default=30.0, gt=0, le=3600)
    """the longest of them; raise it where thousands of nodes would come back to one gateway at once"""
    lookup_s: float = Field(default=5.0, ge=0.5, le=120)
    """one look-up of a dataset's data nodes"""


class TransferTuning(Section):
    """Files on their way: slices, updates, theta, checkpoints, models."""

    sends: int = Field(default=2, ge=1, le=64)
    """sent at once, where bytes move; raise it at a data node whose line one or two workers cannot fill
    (far away, or slow ones). Two fill a gigabit
    """
    receives: int = Field(default=2, ge=1, le=64)
    """received at once; raise it at a parameter server whose workers are many and slow"""
    compression: Literal["auto", "always", "none"] = "auto"
    """compress slices with zstd: auto tries a block now and then, and goes on where that saves more time on
    the line than it costs here; always; none
    """
    compression_level: int = Field(default=3, ge=1, le=19)
    """of zstd: 1 is quickest, beyond 6 it hardly shrinks data further"""


class TuningConfig(Section):
    """What was measured to be right for most networks; docs/tuning.md says when it is not."""

    gossip: GossipTuning = GossipTuning()
    sockets: SocketTuning = SocketTuning()
    connections: ConnectionTuning = ConnectionTuning()
    liveness: LivenessTuning = LivenessTuning()
    transfers: TransferTuning = TransferTuning()


class GatewayTuningConfig(TuningConfig):
    """What was measured to be right for most networks; docs/tuning.md says when it is not."""

    connections: GatewayConnectionTuning = GatewayConnectionTuning()


Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
#: as ``datetime.weekday`` counts them
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _clock(value: object) -> object:
    """``HH:MM`` of text or of a TOML time. ValueError."""
    if isinstance(value, time):
        return f"{value.hour:02}:{value.minute:02}"
    if not isinstance(value, str):
        raise ValueError('a time of day such as "08:00"')
    match = re.fullmatch(r"(\d{1,2}):([0-5]\d)(?::00)?", value.strip())
    if match is None or minutes_of(found := f"{int(match[1]):02}:{match[2]}") > 24 * 60:
        raise ValueError('a time of day such as "08:00", up to "24:00"')
    return found


def minutes_of(clock: str) -> int:
    hours, _, minutes = clock.partition(":")
    return 60 * int(hours) + int(minutes)


Clock = Annotated[str, BeforeValidator(_clock)]


class HoursConfig(Section):
    """Other caps at certain hours. The first entry that holds now counts; what it does not set, and any other
    time, is as above.
    """

    start: Clock = Field(alias="from")
    """local time of this machine; an entry may run past midnight ("22:00" to "06:00")"""
    to: Clock
    days: list[Day] = []
    """mon, tue, wed, thu, fri, sat, sun; of an entry that runs past midnight, when it begins; none: every day
    """
    upload_mbit: float | None = Field(default=None, gt=0)
    download_mbit: float | None = Field(default=None, gt=0)

    def holds(self, weekday: int, minutes: float) -> bool:
        """Whether it does at so many minutes after midnight of a day (Monday is 0)."""
        start, to = minutes_of(self.start), minutes_of(self.to)
        if start < to:
            return start <= minutes < to and self._on(weekday)
        return (minutes >= start and self._on(weekday)) or (minutes < to and self._on((weekday - 1) % 7))

    def _on(self, weekday: int) -> bool:
        return not self.days or DAYS[weekday] in self.days


class LimitsConfig(Section):
    """What this node may use of its line, in megabits a second: of what bulk transfers send and receive, and
    at a gateway of what it relays. Leases, requests and gossip are not held up.
    """

    upload_mbit: float | None = Field(default=None, gt=0)
    """``None``: as much as goes"""
    download_mbit: float | None = Field(default=None, gt=0)
    schedule: list[HoursConfig] = []

    @property
    def caps_upload(self) -> bool:
        return self.upload_mbit is not None or any(one.upload_mbit is not None for one in self.schedule)

    @property
    def caps_download(self) -> bool:
        return self.download_mbit is not None or any(one.download_mbit is not None for one in self.schedule)

    def at(self, weekday: int, minutes: float) -> tuple[float | None, float | None]:
        """The caps in force then (up, down; Mbit/s), Monday is 0; None: there is none."""
        for one in self.schedule:
            if one.holds(weekday, minutes):
                up = self.upload_mbit if one.upload_mbit is None else one.upload_mbit
                down = self.download_mbit if one.download_mbit is None else one.download_mbit
                return up, down
        return self.upload_mbit, self.download_mbit


class WorkerLimitsConfig(LimitsConfig):
    """What jobs may use of this machine, and this node of its line (megabits a second, of what bulk transfers
    send and receive; leases, requests and gossip are not held up).
    """

    enforce: Literal["auto", "cgroup", "rlimit", "none"] = "auto"
    """how a job's resource limits are enforced; ``auto`` takes the strongest that works here"""
    max_processes: int | None = Field(default=None, ge=0)
    """processes and threads that one executor may have, 0: any number; ``None``: 512, or 64 for each core of
    its lease where that is more
    """

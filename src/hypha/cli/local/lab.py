"""Networks that are not loopback: network namespaces joined by cables, with routers that translate and
drop. Needs root, ``ip`` and ``nft`` (see :func:`missing`).

Names are unique to each lab; all namespaces, and with them their cables, are gone when it is closed. The
machine's own network is not touched: cables run from namespace to namespace only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import trio

from hypha.cli.local.node_host import enter_namespace
from hypha.errors import HyphaError

T = TypeVar("T")

#: what a slow node may still send at once: a handful of packets
_BURST_BYTES = 16_000


class LabFailed(HyphaError):
    """A namespace, a cable or a rule could not be made."""


class Lab:
    """Makes namespaces; to be closed."""

    def __init__(self) -> None:
        self._tag = f"hypha{uuid4().hex[:8]}"
        self._made: list[str] = []

    def add(self, name: str) -> str:
        """A new namespace with nothing but loopback; its full name."""
        full = f"{self._tag}-{name}"
        run("ip", "netns", "add", full)
        self._made.append(full)
        run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def cable(self, one: str, one_address: str, other: str, other_address: str) -> None:
        """Addresses are ``10.77.1.2/24``; the interface is called ``to-`` and the other's name."""
        here, there = interface(other), interface(one)
        run("ip", "-n", one, "link", "add", here, "type", "veth", "peer", "name", there, "netns", other)
        for place, name, address in ((one, here, one_address), (other, there, other_address)):
            run("ip", "-n", place, "address", "add", address, "dev", name)
            run("ip", "-n", place, "link", "set", name, "up")

    def route(self, place: str, target: str, via: str) -> None:
        """``target`` (``default``, ``10.77.1.0/24``) is reached by way of ``via``."""
        run("ip", "-n", place, "route", "add", target, "via", via)

    def forwards(self, place: str) -> None:
        run("ip", "netns", "exec", place, "sysctl", "-qw", "net.ipv4.ip_forward=1")

    def rules(self, place: str, script: str) -> None:
        run("ip", "netns", "exec", place, "nft", "-f", "-", feed=script)

    def close(self) -> None:
        """Remove every namespace; whatever still runs in one keeps no name of ours."""
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        self._made.clear()


def interface(name: str) -> str:
    """The end of a cable that leads to namespace ``name``; Linux allows 15 characters."""
    return f"to-{name.partition('-')[2]}"[:15]


async def inside(place: str | None, work: Callable[[], T]) -> T:
    """The result of ``work``, run in a thread whose sockets belong to namespace ``place``."""

    def there() -> T:
        if place is None:
            return work()
        with Path("/proc/thread-self/ns/net").open() as ours, Path(f"/run/netns/{place}").open() as theirs:
            enter_namespace(theirs.fileno())
            try:
                return work()
            finally:
                # trio will use this thread again
                enter_namespace(ours.fileno())

    return await trio.to_thread.run_sync(there)


def run(*command: str, feed: str | None = None) -> str:
    done = subprocess.run(command, input=feed, check=False, capture_output=True, text=True)
    if done.returncode:
        raise LabFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def missing() -> str | None:
    """Why there can be no lab here; ``None`` when there can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", "nft", "sysctl"):
        if shutil.which(program) is None:
            return f"needs the program {program!r} (Debian packages iproute2, nftables, procps)"
    return None


class Star:
    """Every node in a namespace of its own, with one cable to a router, where it can be cut or slowed."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._hub = lab.add("hub")
        lab.forwards(self._hub)
        #: by node: its namespace, and its address there
        self._spots: dict[str, tuple[str, str]] = {}

    def spot(self, name: str) -> tuple[str, str]:
        """The namespace of node ``name``, made when it is new, and its address there."""
        if name not in self._spots:
            net = f"10.78.{len(self._spots) + 1}"
            place = self._lab.add(name)
            self._lab.cable(self._hub, f"{net}.1/24", place, f"{net}.2/24")
            self._lab.route(place, "default", f"{net}.1")
            self._spots[name] = (place, f"{net}.2")
        return self._spots[name]

    def cut(self, name: str, off: bool) -> None:
        """Let its packets vanish at the router, both ways and without a reply; or let them through again."""
        self._filter(name, "cut", "drop" if off else None)

    def slow(self, name: str, bytes_per_s: int | None) -> None:
        """Drop what is more than ``bytes_per_s``, each way by itself; ``None``: no limit any more."""
        hub, place = self._hub, self._spots[name][0]
        # else what the kernel takes for one packet has up to 64 kB, and no such packet passes a limit
        segments = "65535" if bytes_per_s is None else "1"
        for end, far in ((hub, place), (place, hub)):
            run("ip", "-n", end, "link", "set", "dev", interface(far), "gso_max_segs", segments)
        rule = f"limit rate over {bytes_per_s} bytes/second burst {_BURST_BYTES} bytes drop"
        self._filter(name, "slow", rule if bytes_per_s is not None else None)

    def _filter(self, name: str, what: str, rule: str | None) -> None:
        table = f"inet {what}_{list(self._spots).index(name)}"
        if rule is None:
            self._lab.rules(self._hub, f"delete table {table}\n")
            return
        end = interface(self._spots[name][0])
        self._lab.rules(
            self._hub,
            f"table {table} {{\nchain forward {{\ntype filter hook forward priority -10;\n"
            f'iifname "{end}" {rule}\noifname "{end}" {rule}\n}}\n}}\n',
        )

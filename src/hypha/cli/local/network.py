"""A whole network of real processes in one directory: each node runs ``python -m hypha.cli.<program>``.

With a :class:`~hypha.cli.local.lab.Star` each node has a network namespace of its own and can be cut off;
without one they share this machine's loopback. What was struck is healed, and processes and mounts are
gone, when :func:`open_network`'s block ends.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w
import trio

from hypha.cli.local.children import Child, Children, NetworkFailed, children
from hypha.cli.local.lab import Star, inside
from hypha.cli.local.node_host import NodeHost
from hypha.config.environment import child_environment
from hypha.pki.authority import CaFiles, make_node, make_org, make_root
from hypha.pki.identity import IdentityFiles, load_identity
from hypha.scheduler.status.snapshot import JobSnapshot
from hypha.worker.jobs.directory import MAX_SOCKET_PATH_BYTES

N = TypeVar("N", bound="Network")

START_S = 60.0
JOB_S = 240.0
#: what :meth:`Network.status` raises of a scheduler that is not there, or is about to leave
NO_ANSWER = (OSError, HTTPException)
LOOK_S = 0.02
#: the executor host among the network's processes
HOST = "executor-host"
#: outgoing connections have ports from 32768 on (net.ipv4.ip_local_port_range)
_PORTS = (20_000, 32_000)


def base(name: str) -> str:
    """The name of a node whose process was started more than once, each time with ``+1`` and so on."""
    return name.partition("+")[0]


def free_port(host: str = "127.0.0.1") -> int:
    """A free TCP port that Linux gives to no outgoing connection before somebody listens there."""
    while True:
        port = random.randrange(*_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


class Network:
    """Starts nodes in ``root``; ``group`` ends them all."""

    def __init__(self, root: Path, group: Children, star: Star | None = None) -> None:
        self.root = root
        self.group = group
        self.star = star
        self.gateways: list[str] = []
        #: what each node is: gateway, data, worker, scheduler
        self.roles: dict[str, str] = {}
        #: the socket of the executor host that all workers use; without one executors are started cold
        self.executor_host: Path | None = None
        #: in which network namespace a node runs; those not named run in the caller's own
        self.places: dict[str, str] = {}
        #: what a node's command begins with
        self.prefixes: dict[str, tuple[str, ...]] = {}
        #: file systems of their own, small enough to be filled
        self.disks: list[Path] = []
        #: what undoes the faults that nobody has recovered from yet
        self.wounds: dict[int, Callable[[], None]] = {}
        #: where certificates are; those that are not there are made by our own authority
        self.pki = root / "pki"
        made = make_root("System Root", self.pki)
        organisation = make_org("System", CaFiles(made.cert, made.key), self.pki)
        self.ca = CaFiles(organisation.cert, organisation.key, organisation.trust)

    def running(self, role: str) -> list[Child]:
        """Nodes of that role whose processes have not ended."""
        alive = [child for child in self.group.running if child.process.poll() is None]
        return [child for child in alive if self.roles.get(base(child.name)) == role]

    def identity(self, name: str, role: str) -> dict[str, str]:
        """The configuration keys of node ``name``'s identity, made when it is new."""
        directory = self.pki
        if not (directory / f"{name}-cert.pem").exists():
            make_node(name, self.ca, directory, roles=[role])
        return {f"{kind}_pem": str(directory / f"{name}-{kind}.pem") for kind in ("cert", "key", "trust")}

    def peer_id(self, name: str, role: str) -> str:
        keys = self.identity(name, role)
        files = IdentityFiles(*(Path(keys[f"{kind}_pem"]) for kind in ("cert", "key", "trust")))
        return load_identity(files).peer_id

    def host(self, name: str) -> str:
        """The address of node ``name``; in a star it gets its namespace and cable now."""
        if self.star is None:
            return "127.0.0.1"
        self.places[name], host = self.star.spot(name)
        return host

    def write(self, name: str, role: str, **keys: Any) -> Path:
        """``<name>.toml``; ``keys`` override what a node on this machine needs."""
        self.roles[name] = role
        config: dict[str, Any] = {**self.identity(name, role), "exclude_cidr": []}
        if "listen_addresses" not in keys:
            config["listen_addresses"] = [f"/ip4/{self.host(name)}/tcp/0"]
        if role != "gateway":
            config["gateway_addresses"] = list(self.gateways)
        path = self.root / f"{name}.toml"
        path.write_text(tomli_w.dumps({**config, **keys}))
        return path

    def config(self, name: str) -> dict[str, Any]:
        """What :meth:`write` has written for this node."""
        return tomllib.loads((self.root / f"{base(name)}.toml").read_text())

    def small_disk(self, directory: Path, size_mb: int) -> None:
        """``directory`` becomes a file system of that size, until the network ends. Needs root."""
        directory.mkdir(parents=True, exist_ok=True)
        options = f"size={size_mb}m,mode=0700"
        command = ("mount", "-t", "tmpfs", "-o", options, "hypha", str(directory))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NetworkFailed(f"{' '.join(command)}: {done.stderr.strip()}")
        self.disks.append(directory)

    async def start_host(self) -> None:
        """Start one executor host for all workers. Not where its socket's path would be too long: a host for
        each would take more memory than the executors save time.
        """
        path = self.root / "host" / "host.sock"
        if sys.platform != "linux" or len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            return
        await self.group.start(
            HOST,
            "hypha.executor.host",
            "--socket",
            str(path),
            # as executors have it, or it could not fork any
            environment=child_environment(self.group.environment),
            needed=False,
        )
        self.executor_host = path

    async def start(self, name: str, program: str, path: Path) -> Child:
        return await self.group.start(
            name,
            f"hypha.cli.{program}",
            *("run", "--config", str(path)),
            prefix=self.prefixes.get(base(name), ()),
            network_namespace=self.places.get(base(name)),
        )

    def plan_gateway(self, name: str = "gateway", host: str | None = None) -> dict[str, Any]:
        """Choose a gateway's address, so that others may be started before it."""
        address = f"/ip4/{host or self.host(name)}/tcp/{free_port('0.0.0.0')}"
        self.gateways.append(f"{address}/p2p/{self.peer_id(name, 'gateway')}")
        return {"listen_addresses": [address], "external_addresses": [address]}

    async def gateway(self, name: str = "gateway", planned: dict[str, Any] | None = None) -> Child:
        """Start a gateway. Its address is known before it listens, so that the others may start meanwhile."""
        planned = planned or self.plan_gateway(name)
        return await self.start(name, "gateway", self.write(name, "gateway", **planned))

    async def data(self, name: str, *datasets: Path, **keys: Any) -> Child:
        served = [{"path": str(path)} for path in datasets]
        return await self.start(name, "data", self.write(name, "data", datasets=served, **keys))

    async def worker(self, name: str, **keys: Any) -> Child:
        """Start a worker with room for a training job and a parameter server."""
        offered = {"cpu": 2, "memory": 8, "storage": 2, "gpu": 0}
        host = self.executor_host
        keys = {
            "work_dir": str(self.root / f"work-{name}"),
            "resources": offered,
            # it plays a machine of its own, and all of them are on one
            "detect_resources": False,
            **({"warm": False} if host is None else {"warm_host": str(host)}),
            **keys,
        }
        return await self.start(name, "worker", self.write(name, "worker", **keys))

    async def scheduler(self, job: dict[str, Any], name: str = "scheduler", **keys: Any) -> Child:
        """Start a scheduler with that ``[scheduler.job]``; its model goes to ``<root>/model``. No batch is
        tried first: that would import torch once more for each job, on the cores that train.
        """
        job = {"output": str(self.root / "model"), "check": "quick", **job}
        keys = {
            "http_address": "127.0.0.1:0",
            "state_dir": str(self.root / "state"),
            "scheduler": {"job": job},
            **keys,
        }
        return await self.start(name, "scheduler", self.write(name, "scheduler", **keys))

    async def logged_value(self, child: Child, key: str, timeout_s: float = START_S) -> Any:
        """The value of ``key`` in one of its log entries, as soon as there is one."""
        with trio.move_on_after(timeout_s):
            while True:
                if key in child.look() or child.process.poll() is not None:
                    break
                await trio.sleep(LOOK_S)
        if key not in child.look():
            ended = "ended" if child.process.poll() is not None else f"ran for {timeout_s:g} s"
            raise NetworkFailed(f"{child.name} {ended} without logging {key}:\n{child.tail()}")
        return child.fields[key]

    async def status(self, scheduler: Child) -> JobSnapshot:
        """The reply of the scheduler's /status. Raises one of ``NO_ANSWER`` when it does not answer."""
        address = await self.logged_value(scheduler, "http_address")

        def get() -> bytes:
            # twenty times a second: a fifth of what an HTTP client of its own for each would take
            connection = HTTPConnection(address, timeout=5.0)
            try:
                connection.request("GET", "/status")
                return connection.getresponse().read()
            finally:
                connection.close()

        answer = await inside(self.places.get(base(scheduler.name)), get)
        return msgspec.json.decode(answer, type=JobSnapshot)

    async def reached(
        self, scheduler: Child, holds: Callable[[JobSnapshot], bool], timeout_s: float = JOB_S
    ) -> JobSnapshot:
        """The first snapshot for which ``holds``; fails when the scheduler ends before."""
        with trio.move_on_after(timeout_s):
            while scheduler.process.poll() is None:
                try:
                    snapshot = await self.status(scheduler)
                except NO_ANSWER:
                    await trio.sleep(0.05)
                    continue
                if holds(snapshot):
                    return snapshot
                await trio.sleep(0.05)
            raise NetworkFailed(f"the scheduler ended too early:\n{scheduler.tail()}")
        raise NetworkFailed(f"the job did not come that far within {timeout_s:g} s:\n{scheduler.tail()}")

    def heal(self) -> None:
        """Undo every fault that is not recovered from: what sleeps could not even be ended in order."""
        for number in list(self.wounds):
            self.wounds.pop(number)()

    def unmount(self) -> None:
        """Give up the small file systems, busy or not."""
        while self.disks:
            subprocess.run(["umount", "--lazy", str(self.disks.pop())], check=False, capture_output=True)


@asynccontextmanager
async def open_network(
    kind: type[N],
    root: Path,
    environment: Mapping[str, str],
    star: Star | None = None,
    node_host: NodeHost | None = None,
) -> AsyncIterator[N]:
    """A network of that class in ``root``; its nodes are forked by ``node_host``, or a host of its own."""
    with ExitStack() as stack:
        async with children(root, environment, node_host) as group:
            network = kind(root, group, star)
            # once nobody uses them any more
            stack.callback(network.unmount)
            try:
                yield network
            finally:
                network.heal()

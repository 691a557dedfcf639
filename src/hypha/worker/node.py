"""A whole worker, from its configuration to its clean end."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from hypha import keeper
from hypha.config.inherited import child_environment
from hypha.config.models import WorkerConfig
from hypha.errors import ConfigError, Problem
from hypha.journal import Journal
from hypha.messages import ExecutorClass, ExecutorDescriptor, PeerRef, Resources
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.runtime import in_thread, is_simulated
from hypha.telemetry import health_of, serve_http
from hypha.telemetry.logs import bind
from hypha.worker.allowance import Allowance
from hypha.worker.arbiter import Arbiter
from hypha.worker.cache import SliceCache
from hypha.worker.connectors import Connectors
from hypha.worker.devices import GpuPins, list_gpus
from hypha.worker.directory import remove_stale
from hypha.worker.execution import Workshop
from hypha.worker.isolation import check_bubblewrap
from hypha.worker.jobs import Jobs
from hypha.worker.limits import CgroupPlaces, no_cgroups, usable_cgroups
from hypha.worker.offers import LeaseDesk, serve_offers
from hypha.worker.orphans import Orphans
from hypha.worker.replicas import ReplicaStore
from hypha.worker.room import lack_of_room
from hypha.worker.signals import shown, watch_resources
from hypha.worker.spans import EmitSpans
from hypha.worker.starting import RunExecutor, run_process
from hypha.worker.storage_desk import StorageDesk
from hypha.worker.warm import ExecutorHost, open_host

logger = logging.getLogger(__name__)

#: Once cancelled, whatever is left is cut after this long.
LAST_S = 4.0


async def work(
    config: WorkerConfig,
    emit_spans: EmitSpans | None = None,
    *,
    alone: bool = False,
    task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED,
) -> None:
    """See :func:`hypha.worker.run_worker`."""
    if alone:
        # executors run as the same user: the key in memory, and secrets in the environment, are not theirs
        keeper.deny_inspection()
    _check_work_dir(config.work_dir)
    cgroups = usable_cgroups()
    if config.limits == "cgroup" and not cgroups:
        raise no_cgroups()
    await in_thread(check_bubblewrap, config)
    for path in remove_stale(config.work_dir):
        logger.warning("Removed %s, which an earlier worker left behind.", path)
    options = options_from(config, "hypha-worker")
    async with _in_order() as (first, last):
        with last:
            async with open_node(options) as node:
                with first:
                    running: dict[int, ExecutorClass] = {}
                    hosts: list[ExecutorHost] = []
                    orphans = Orphans(lambda: {*running, *(host.pid for host in hosts if host.pid)})
                    if alone:
                        orphans.adopt()
                    async with open_host(config, child_environment(), orphans.starting) as host:
                        hosts += [] if host is None else [host]
                        run = partial(
                            run_process,
                            host=host,
                            running=running,
                            orphans=orphans if alone else None,
                        )
                        async with watch_resources(config.work_dir, lambda: dict(running)):
                            await serve(
                                config, node, cgroups, run, emit_spans=emit_spans, task_status=task_status
                            )


def _check_work_dir(path: Path) -> None:
    """Make it, and write there. Raises ConfigError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as exc:
        message = f"{path} cannot be written ({exc.strerror}); choose another directory"
        raise ConfigError([Problem("work_dir", message)]) from exc


@asynccontextmanager
async def _in_order() -> AsyncIterator[tuple[trio.CancelScope, trio.CancelScope]]:
    """Two scopes: cancelled from outside, the first is cancelled at once, the second, shielded, later. So
    executors are gone and connections closed before the node is cut off.
    """
    first, last = trio.CancelScope(), trio.CancelScope(shield=True)

    async def pass_on() -> None:
        try:
            await trio.sleep_forever()
        finally:
            first.cancel()
            last.deadline = trio.current_time() + LAST_S

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on)
        yield first, last
        nursery.cancel_scope.cancel()


async def serve(
    config: WorkerConfig,
    node: Node,
    cgroups: CgroupPlaces,
    run_executor: RunExecutor = run_process,
    journal: Journal | None = None,
    emit_spans: EmitSpans | None = None,
    *,
    task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a worker through ``node``, whose executors ``run_executor`` runs, until cancelled. ``journal`` is
    that of its arbiter and its leases; ``emit_spans`` exports the executors' spans.
    """
    bind(worker_peer_id=node.peer_id)
    environment = child_environment()
    allowance = Allowance(config.allow, config.exclude_cidr)
    if config.allow.local:
        logger.warning(
            "allow.local is the earlier name of two keys, and lets jobs both read and write what it lists: "
            "write allow.local_read and allow.local_write instead."
        )
    workshop = Workshop(
        node=node,
        config=config,
        cache=SliceCache(config.work_dir.resolve() / "cache", config.cache),
        allowance=allowance,
        connectors=Connectors(allowance, node.request, node.transfers.pull),
        cgroups=cgroups,
        gpus=GpuPins(list_gpus(environment)),
        environment=environment,
        run_executor=run_executor,
        emit_spans=emit_spans,
    )
    arbiter = Arbiter(
        Resources(**config.resources.model_dump()),
        [ExecutorDescriptor(kind=one.kind, name=one.name) for one in config.executors],
        config.offer,
        node.ref,
        journal=journal,
    )
    with contextlib.ExitStack() as gauges:
        async with trio.open_nursery() as nursery:
            jobs = Jobs(workshop, nursery)
            desk = jobs.desk = LeaseDesk(arbiter, jobs.lease_ended, workshop.cache.datasets)
            jobs.answer()
            if not is_simulated():
                gauges.enter_context(shown(jobs, desk, workshop.cache))
            store = ReplicaStore(config.work_dir.resolve() / "checkpoints", config.storage)
            storage = StorageDesk(node, store, lambda: desk.leases)
            storage.answer()
            await nursery.start(serve_offers, node, desk, lambda: lack_of_room(config.work_dir))
            if config.http_address is not None:
                await nursery.start(serve_http, config.http_address, lambda: health_of(node))
            task_status.started(node.ref())
            await node.wait_connected()
            nursery.start_soon(storage.announce)
            logger.info("The worker is connected and waits for requests.", extra={"peer_id": node.peer_id})

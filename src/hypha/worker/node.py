"""A whole worker, from its configuration to its clean end."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from msgspec import structs

from hypha.config.environment import child_environment
from hypha.config.models import PreemptionConfig, WorkerConfig
from hypha.errors import ConfigError, Problem
from hypha.journal import Journal
from hypha.messages import ExecutorDescriptor, PeerRef, Resources
from hypha.net import open_node, options_from
from hypha.node import Node
from hypha.processes import keeper
from hypha.runtime import in_thread, is_simulated, lack_of_space
from hypha.telemetry import health_of, serve_http
from hypha.telemetry.logs import bind
from hypha.telemetry.page import worker_routes
from hypha.telemetry.resources import watch_disks, watch_machine
from hypha.worker.bridge.spans import EmitSpans
from hypha.worker.control import serve_control
from hypha.worker.fetch.allowance import Allowance
from hypha.worker.fetch.connectors import Connectors
from hypha.worker.jobs.directory import remove_stale
from hypha.worker.jobs.jobs import Jobs
from hypha.worker.jobs.starting import ExecutorBackend, run_process
from hypha.worker.jobs.traffic import ExecutionContext
from hypha.worker.leasing.arbiter import Arbiter
from hypha.worker.leasing.given import given_leases
from hypha.worker.leasing.leaving import Leaving
from hypha.worker.leasing.offers import serve_offers
from hypha.worker.leasing.preemption import notice_left_s, watch_for_notice
from hypha.worker.leasing.terms import WorkerCapacity
from hypha.worker.limits.cgroups import remove_stale_groups, usable_cgroups
from hypha.worker.limits.detecting import DetectedMachine, detect, lowered, usable_cores
from hypha.worker.limits.gpus import memory_of_each
from hypha.worker.limits.limits import Means, mechanisms, no_cgroups, suffice
from hypha.worker.limits.quotas import usable_quotas
from hypha.worker.limits.usage import CorePins
from hypha.worker.processes.isolation import check_bubblewrap
from hypha.worker.processes.process import Supervision
from hypha.worker.processes.warm import open_host
from hypha.worker.signals import shown
from hypha.worker.slices.cache import SliceCache
from hypha.worker.storage.replicas import ReplicaStore
from hypha.worker.storage.requests import StorageService

logger = logging.getLogger(__name__)

#: Once cancelled, whatever is left is cut after this long, and after the time of a notice.
LAST_S = 4.0
#: Of that, what it takes at most to hand over what was trained, and leases, where no notice is configured.
STOP_LEAVE_S = 1.5


async def run_worker(
    config: WorkerConfig,
    *,
    emit_spans: EmitSpans | None = None,
    alone: bool = False,
    task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Work until cancelled; ``task_status`` gives this node once it listens and receives requests.
    ``emit_spans`` exports the spans of executors, and must not block; without, they record none. ``alone``:
    this process does nothing else, so it adopts and ends what executors leave behind (:class:`Supervision`),
    and lets none of this user's processes look into it.

    Cancelled, it kills its executors and is gone within 5 s. Raises ConfigError (IdentityError).
    """
    if alone:
        # executors run as the same user: the key in memory, and secrets in the environment, are not theirs
        keeper.deny_inspection()
    _check_work_dir(config.work_dir)
    cgroups = usable_cgroups()
    if config.limits.enforce == "cgroup" and not suffice(cgroups):
        raise no_cgroups()
    if removed := remove_stale_groups(cgroups):
        logger.info("Removed %d cgroups that workers which were killed have left behind.", removed)
    # before anybody looks how much space there is
    for path in remove_stale(config.work_dir):
        logger.warning("Removed %s, which an earlier worker left behind.", path)
    machine = await in_thread(detect, config.work_dir, child_environment())
    config, words = offered(config, machine)
    means = Means(
        mode=config.limits.enforce,
        cgroups=cgroups,
        max_processes=config.limits.max_processes,
        gpus=machine.gpus,
        cores=CorePins(usable_cores()),
        quotas=await in_thread(usable_quotas, config.work_dir),
    )
    words |= _in_force(means, config.cache.max_gb)
    await in_thread(check_bubblewrap, config)
    options = options_from(config, "hypha-worker")
    async with _in_order(LAST_S + (config.preemption.notice_s or 0.0)) as (first, last):
        with last:
            async with open_node(options) as node:
                with first:
                    supervision = Supervision(adopting=alone)
                    opening = open_host(config, child_environment(), supervision.starting)
                    async with opening as supervision.host:
                        backend = ExecutorBackend(partial(run_process, supervision=supervision), emit_spans)
                        disks = watch_disks({"work_dir": [config.work_dir]})
                        async with disks, watch_machine(lambda: dict(supervision.running)):
                            node.health_details.append(lambda: words)
                            await serve(config, node, means, backend, task_status=task_status)


def offered(config: WorkerConfig, machine: DetectedMachine) -> tuple[WorkerConfig, dict[str, str]]:
    """``config`` with what may be offered of its resources on ``machine``, and that in words, for its
    health; what is lowered is logged.
    """
    configured = Resources(**config.resources.model_dump())
    resources, claims = lowered(configured, machine) if config.detect_resources else (configured, ())
    for claim in claims:
        logger.warning("%s. Set detect_resources = false where that is wrong.", claim)
    words = {}
    for name, found in machine.describe().items():
        amount = getattr(resources, name)
        words[f"resource {name}"] = f"{amount:g} offered ({found})"
    logger.info("Resources: %s.", "; ".join(f"{name.split()[1]} {text}" for name, text in words.items()))
    section = config.resources.model_copy(update=structs.asdict(resources))
    return config.model_copy(update={"resources": section}), words


def _in_force(means: Means, cache_gb: float) -> dict[str, str]:
    """By what each resource is enforced, for the health of the node; logged, too."""
    found = mechanisms(means, cache_gb)
    logger.info("Limits in force: %s.", "; ".join(f"{name}: {by}" for name, by in found.items()))
    return {f"limit {name}": by for name, by in found.items()}


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
async def _in_order(last_s: float) -> AsyncIterator[tuple[trio.CancelScope, trio.CancelScope]]:
    """Two scopes: cancelled from outside, the first is cancelled at once, the second, shielded, ``last_s``
    later. So executors are gone and connections closed before the node is cut off.
    """
    first, last = trio.CancelScope(), trio.CancelScope(shield=True)

    def pass_on() -> None:
        first.cancel()
        last.deadline = trio.current_time() + last_s

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_when_cancelled, pass_on)
        yield first, last
        nursery.cancel_scope.cancel()


async def serve(
    config: WorkerConfig,
    node: Node,
    means: Means,
    backend: ExecutorBackend,
    journal: Journal | None = None,
    *,
    task_status: trio.TaskStatus[PeerRef] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Be a worker through ``node``, whose executors ``backend`` runs, until cancelled. ``journal`` is that of
    its arbiter and its leases.
    """
    bind(worker_peer_id=node.peer_id)
    allowance = Allowance(config.allow, config.exclude_cidr)
    context = ExecutionContext(
        node=node,
        config=config,
        cache=SliceCache(config.work_dir.resolve() / "cache", config.cache),
        allowance=allowance,
        connectors=Connectors(allowance, node),
        means=means,
        backend=backend,
    )
    arbiter = Arbiter(
        WorkerCapacity(
            Resources(**config.resources.model_dump()),
            [ExecutorDescriptor(kind=one.kind, name=one.name) for one in config.executors],
            memory_of_each(means.gpus, config.resources.gpu),
        ),
        config.offer,
        node.ref,
        journal=journal,
    )
    stopped = trio.Event()
    # cancelled from outside, the worker goes on for a moment: it leaves first
    async with trio.open_nursery() as outside:
        outside.start_soon(_when_cancelled, stopped.set)
        with trio.CancelScope(shield=True), contextlib.ExitStack() as gauges:
            async with trio.open_nursery() as nursery:
                jobs = Jobs(context, nursery, arbiter)
                lease_service = jobs.lease_service
                leaving = Leaving(node, lease_service)
                nursery.start_soon(_end_when_left, leaving, config.preemption, stopped, nursery.cancel_scope)
                jobs.answer()
                node.health_details.append(
                    lambda: {"offers": leaving.in_words, "price": arbiter.pricing.in_words}
                )
                if not is_simulated():
                    gauges.enter_context(shown(jobs, lease_service, context.cache))
                    await nursery.start(
                        serve_control, config.work_dir, leaving, lambda: len(lease_service.leases)
                    )
                store = ReplicaStore(config.work_dir.resolve() / "checkpoints", config.storage)
                storage = StorageService(node, store, lambda: lease_service.leases)
                storage.answer()
                await nursery.start(serve_offers, node, lease_service, lambda: lack_of_space(config.work_dir))
                if config.http_address is not None:
                    leases = {"leases": lambda: given_leases(lease_service, leaving, node.peer_id)}
                    routes = await in_thread(worker_routes)
                    health = partial(serve_http, config.http_address, lambda: health_of(node))
                    await nursery.start(partial(health, routes=routes, lookups=leases))
                task_status.started(node.ref())
                await node.wait_connected()
                nursery.start_soon(storage.announce)
                logger.info(
                    "The worker is connected and waits for requests.", extra={"peer_id": node.peer_id}
                )
        outside.cancel_scope.cancel()


async def _when_cancelled(call: Callable[[], None]) -> None:
    try:
        await trio.sleep_forever()
    finally:
        call()


async def _end_when_left(
    leaving: Leaving, config: PreemptionConfig, stopped: trio.Event, scope: trio.CancelScope
) -> None:
    """Have the worker leave when it is ``stopped``, or there is notice of its machine's end, and cancel
    ``scope`` once it has left, whoever had it leave.
    """

    async def when_stopped() -> None:
        await stopped.wait()
        within_s = notice_left_s(config, polled=False)
        why = "it was told to stop"
        leaving.begin(STOP_LEAVE_S if within_s is None else within_s, why, patient=within_s is not None)

    async def at_notice() -> None:
        notice = await watch_for_notice(config)
        leaving.begin(notice_left_s(config, polled=True) or STOP_LEAVE_S, notice)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(when_stopped)
        nursery.start_soon(at_notice)
        await leaving.run()
        nursery.cancel_scope.cancel()
    scope.cancel()

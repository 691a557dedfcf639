"""All observations of a subject, and all findings in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import trio

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding, in_order
from hypha.cli.doctor.gathered import (
    IdentityObservations,
    MachineObservations,
    Observations,
    ServiceObservations,
)
from hypha.cli.doctor.gathering import Gathering
from hypha.cli.doctor.gathering.machine import gather_identity, gather_machine, gather_served, parameters_of
from hypha.cli.doctor.gathering.network import gather_network
from hypha.cli.doctor.judging.job import judge_dataset, judge_job, judge_offers, judge_running, judge_served
from hypha.cli.doctor.judging.machine import judge_identity, judge_machine, judge_versions
from hypha.cli.doctor.judging.network import judge_network
from hypha.cli.doctor.subject import Subject
from hypha.config.job import DatasetRef
from hypha.config.models import DataConfig, WorkerConfig
from hypha.errors import HyphaError
from hypha.pki.identity import Identity

_NETWORK = "the network"
IDENTITY_S, SERVED_S, MODEL_S = 10.0, 20.0, 10.0


async def gather(
    subject: Subject, peers: Sequence[str] = (), dataset: DatasetRef | None = None, offline: bool = False
) -> Observations:
    """All observations of ``subject``, at the same time as far as they do not disturb each other; also of
    addresses of ``peers``, and of a ``dataset``. ``offline``: nothing beyond this machine.
    """
    gathering, config, job = Gathering(), subject.config, subject.job
    machine, around = MachineObservations(), Observations()
    known: IdentityObservations | None = None
    identity: Identity | None = None
    served: ServiceObservations | None = None
    parameters: int | None = None
    if subject.files is not None:
        known, identity = await gathering.in_thread(
            IDENTITY_S, "the identity", gather_identity, subject.files
        ) or (None, None)

    async def look_at_machine() -> None:
        nonlocal machine
        machine = await gather_machine(gathering, config)

    async def look_at_network() -> None:
        nonlocal around
        if config is None or identity is None:
            why = "this node has no identity" if known is None else "its identity cannot be used"
            gathering.note(_NETWORK, "the configuration is not valid" if config is None else why)
            return
        try:
            around = await gather_network(gathering, subject, config, identity, peers, dataset)
        except HyphaError as exc:
            # such as a port that somebody has taken since it was looked at
            gathering.note(_NETWORK, str(exc))

    async def look_at_files() -> None:
        nonlocal served, parameters
        if isinstance(config, DataConfig):
            served = await gathering.in_thread(SERVED_S, "the datasets to serve", gather_served, config)
        if job is not None:
            parameters = await gathering.in_thread(MODEL_S, "the model's size", parameters_of, job)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_at_machine)
        nursery.start_soon(look_at_files)
        if not offline and (identity is not None or subject.path is not None):
            nursery.start_soon(look_at_network)
    if served is not None and around.running is not None and around.running.announcements is not None:
        # a running data node counts the announcements that gateways have taken
        served = replace(served, announced=around.running.announcements > 0)
    return replace(
        around,
        machine=machine,
        identity=known,
        parameters=parameters,
        served=served,
        unknown=tuple(gathering.unknown),
    )


def judge(subject: Subject, observed: Observations, line: float | None = None) -> list[Finding]:
    """The gravest first; ``line`` is what the line carries, in bytes a second, where the caller states it."""
    return in_order(_all(subject, observed, line))


def _all(subject: Subject, observed: Observations, line: float | None) -> Iterator[Finding]:
    config, job = subject.config, subject.job
    for problem in subject.problems:
        mend = f"correct it; `{subject.program} validate -c {subject.path}` checks it again"
        yield checks.CONFIGURATION.found(str(problem).rstrip("."), mend)
    yield from judge_machine(observed.machine, config)
    if observed.identity is not None:
        require_roles = config is None or config.require_roles
        yield from judge_identity(observed.identity, subject.component, require_roles)
    if observed.network is not None and config is not None:
        yield from judge_network(observed.network, observed.machine, config, line)
        contacts = (*observed.network.gateways, *observed.network.peers, *observed.network.data_nodes)
        yield from judge_versions(observed.machine.versions, contacts)
    if observed.dataset is not None:
        yield from judge_dataset(observed.dataset)
    if observed.served is not None:
        yield from judge_served(observed.served, None if job is None else job.dataset.dataset)
    if observed.running is not None:
        yield from judge_running(observed.running)
    if job is not None:
        gateways = observed.network.gateways if observed.network is not None else ()
        yield from judge_job(job, observed.parameters, gateways)
        if isinstance(config, WorkerConfig):
            yield from judge_offers(config, job, observed.machine.has)
    for one in observed.unknown:
        yield checks.NOT_CHECKED.found(f"{one.what} could not be found out: {one.why.rstrip('.')}")

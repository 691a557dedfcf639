"""All findings in all observations."""

from __future__ import annotations

from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Finding, in_order
from hypha.cli.doctor.gathered import Observations
from hypha.cli.doctor.judging.data import judge_dataset, judge_served
from hypha.cli.doctor.judging.identity import judge_identity
from hypha.cli.doctor.judging.job import judge_job
from hypha.cli.doctor.judging.machine import judge_machine, judge_versions
from hypha.cli.doctor.judging.network import judge_network
from hypha.cli.doctor.judging.offers import judge_offers
from hypha.cli.doctor.judging.running import judge_running
from hypha.cli.doctor.subject import Subject
from hypha.config.models import WorkerConfig


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

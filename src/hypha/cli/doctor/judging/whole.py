"""All findings in all facts."""

from __future__ import annotations

from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Finding, in_order
from hypha.cli.doctor.gathered import Facts
from hypha.cli.doctor.judging.data import judge_dataset, judge_served
from hypha.cli.doctor.judging.identity import judge_identity
from hypha.cli.doctor.judging.job import judge_job
from hypha.cli.doctor.judging.machine import judge_machine, judge_versions
from hypha.cli.doctor.judging.network import judge_network
from hypha.cli.doctor.judging.offers import judge_offers
from hypha.cli.doctor.judging.running import judge_running
from hypha.cli.doctor.subject import Subject
from hypha.config.models import WorkerConfig


def judge(subject: Subject, facts: Facts, line: float | None = None) -> list[Finding]:
    """The gravest first; ``line`` is what the line carries, in bytes a second, where somebody says so."""
    return in_order(_all(subject, facts, line))


def _all(subject: Subject, facts: Facts, line: float | None) -> Iterator[Finding]:
    config, job = subject.config, subject.job
    for problem in subject.problems:
        mend = f"correct it; `{subject.program} validate -c {subject.path}` checks it again"
        yield checks.CONFIGURATION.found(str(problem).rstrip("."), mend)
    yield from judge_machine(facts.machine, config)
    if facts.identity is not None:
        require_roles = config is None or config.require_roles
        yield from judge_identity(facts.identity, subject.component, require_roles)
    if facts.network is not None and config is not None:
        yield from judge_network(facts.network, facts.machine, config, line)
        contacts = (*facts.network.gateways, *facts.network.peers, *facts.network.data_nodes)
        yield from judge_versions(facts.machine.versions, contacts)
    if facts.dataset is not None:
        yield from judge_dataset(facts.dataset)
    if facts.served is not None:
        yield from judge_served(facts.served, None if job is None else job.dataset.dataset)
    if facts.running is not None:
        yield from judge_running(facts.running)
    if job is not None:
        gateways = facts.network.gateways if facts.network is not None else ()
        yield from judge_job(job, facts.parameters, gateways)
        if isinstance(config, WorkerConfig):
            yield from judge_offers(config, job, facts.machine.has)
    for one in facts.unknown:
        yield checks.NOT_CHECKED.found(f"{one.what} could not be found out: {one.why.rstrip('.')}")

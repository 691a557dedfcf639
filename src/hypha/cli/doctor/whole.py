"""The doctor's whole course: all observations of a subject, all findings in them, and how both are printed:
lines for people, JSON for machines.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import msgspec
from rich.console import Console

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import SEVERITIES, Finding, Severity, exit_code_of, in_order
from hypha.cli.doctor.gathered import Contact, IdentityObservations, Observations
from hypha.cli.doctor.gathering import Gathering, at_once, nothing
from hypha.cli.doctor.gathering.machine import gather_identity, gather_machine, gather_served, parameters_of
from hypha.cli.doctor.gathering.network import gather_network
from hypha.cli.doctor.judging.job import (
    capacity_of,
    judge_dataset,
    judge_job,
    judge_offers,
    judge_running,
    judge_served,
)
from hypha.cli.doctor.judging.machine import judge_identity, judge_machine, judge_versions
from hypha.cli.doctor.judging.network import judge_network
from hypha.cli.doctor.subject import Subject
from hypha.cli.printing import print_json, shown
from hypha.config.job import DatasetRef
from hypha.config.models import DataConfig, WorkerConfig
from hypha.naming import named
from hypha.pki.identity import Identity

_STYLES: dict[Severity, str] = {"note": "dim", "warning": "yellow", "error": "bold red"}
_MBIT = 10**6 / 8
_NETWORK = "the network"
IDENTITY_S, SERVED_S, MODEL_S = 10.0, 20.0, 10.0


async def gather(
    subject: Subject, peers: Sequence[str] = (), dataset: DatasetRef | None = None, offline: bool = False
) -> Observations:
    """All observations of ``subject``, at the same time as far as they do not disturb each other; also of
    addresses of ``peers``, and of a ``dataset``. ``offline``: nothing beyond this machine.
    """
    gathering, config, job = Gathering(), subject.config, subject.job
    known: IdentityObservations | None = None
    identity: Identity | None = None
    if subject.files is not None:
        known, identity = await gathering.in_thread(
            IDENTITY_S, "the identity", gather_identity, subject.files
        ) or (None, None)

    async def look_around() -> Observations | None:
        if offline or (identity is None and subject.path is None):
            return None
        if config is None or identity is None:
            why = "this node has no identity" if known is None else "its identity cannot be used"
            gathering.note(_NETWORK, "the configuration is not valid" if config is None else why)
            return None
        # what may fail is such as a port that somebody has taken since it was looked at
        look = partial(gather_network, gathering, subject, config, identity, peers, dataset)
        return await gathering.within(math.inf, _NETWORK, look)

    data, model = nothing, nothing
    if isinstance(config, DataConfig):
        data = partial(gathering.in_thread, SERVED_S, "the datasets to serve", gather_served, config)
    if job is not None:
        model = partial(gathering.in_thread, MODEL_S, "the model's size", parameters_of, job)
    machine, around, served, parameters = await at_once(
        partial(gather_machine, gathering, config), look_around, data, model
    )
    around = around or Observations()
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
        what = str(problem).rstrip(".")
        yield checks.CONFIGURATION.found(what, component=subject.component, config=subject.path)
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
            yield from judge_offers(capacity_of(config, observed.machine.has), config.offer, job)
    for one in observed.unknown:
        yield checks.NOT_CHECKED.found(f"{one.what} could not be found out: {one.why.rstrip('.')}")


def show(subject: Subject, observed: Observations, findings: Sequence[Finding]) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)
    for line in seen(subject, observed):
        console.print(shown(named(line)), soft_wrap=True)
    for finding in findings:
        console.print(shown(named(str(finding)), _STYLES[finding.severity]), soft_wrap=True)
    console.print(shown(summary(findings)), soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    """``1 error, 2 warnings, 0 notes``."""
    counts = {one: sum(finding.severity == one for finding in findings) for one in SEVERITIES}
    if not findings:
        return "OK: nothing is found"
    return ", ".join(f"{counts[one]} {one}{'' if counts[one] == 1 else 's'}" for one in reversed(SEVERITIES))


def seen(subject: Subject, observed: Observations) -> Iterator[str]:
    """What was looked at, in lines."""
    if subject.path is not None:
        state = ""
        if observed.network is not None:
            state = ", running" if observed.network.running else ", not running here"
        peer = (
            f" ({observed.identity.peer})" if observed.identity is not None and observed.identity.peer else ""
        )
        yield f"{subject.component} of {subject.path}{peer}{state}"
    for directory in observed.machine.directories:
        rate = "" if directory.write_rate is None else f", {directory.write_rate / 1e6:.0f} MB/s"
        free = "?" if directory.free_bytes is None else f"{directory.free_bytes / 1e9:.1f}"
        yield f"{directory.key} {directory.path}: {free} GB free{rate}"
    if observed.network is not None:
        found = observed.network
        for what, contacts in (
            ("gateway", found.gateways),
            ("peer", found.peers),
            ("data node", found.data_nodes),
        ):
            for contact in contacts:
                yield f"{what} {contact.address}: {_contact(contact)}"
        for one in observed.network.dialled:
            who = f"gateway {one.by}" if one.by else "this machine"
            how = "not tried" if not one.tried else one.reason or "it can"
            yield f"can {who} dial this node at {one.address}? {how}"
    if observed.dataset is not None:
        wanted = observed.dataset
        serving = [one for one in wanted.providers if one.manifest_hash]
        yield f"dataset {wanted.name}: {len(wanted.providers)} announce it, {len(serving)} serve it"
        for provider in serving:
            if provider.rate is not None:
                size = f"{provider.largest_slice / 1e6:.2g} MB"
                rate = _mbit(provider.rate)
                yield f"slices of up to {size} come from {provider.called} with {rate} at least"


def _mbit(rate: float) -> str:
    """Two digits that count."""
    return f"{float(f'{rate / _MBIT:.2g}'):g} Mbit/s"


def _contact(contact: Contact) -> str:
    if contact.failure is not None:
        return f"NOT reached: {contact.reason}"
    words = [contact.name or contact.peer, contact.component]
    words += [f"{contact.round_trip_s * 1000:.1f} ms"] if contact.round_trip_s is not None else []
    words += [f"{_mbit(contact.up)} up"] if contact.up is not None else []
    words += [f"{_mbit(contact.down)} down at least"] if contact.down is not None else []
    return f"{'reached through a relay' if contact.relayed else 'reached'}: {', '.join(filter(None, words))}"


def show_json(subject: Subject, observed: Observations, findings: Sequence[Finding]) -> None:
    """One object; numbers that are not finite are null."""
    listed = [
        {
            "check": one.check.name,
            "severity": one.severity,
            "what": one.what,
            "why": one.check.why,
            "mend": one.mend,
            "symptom": one.check.symptom.title,
        }
        for one in findings
    ]
    whole = {
        "component": subject.component,
        "configuration": None if subject.path is None else str(subject.path),
        "exit_code": exit_code_of(findings),
        "findings": listed,
        "facts": msgspec.to_builtins(observed, enc_hook=str),
    }
    print_json(whole)

"""What the doctor prints: lines for people, JSON for machines."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import msgspec
from rich.console import Console

from hypha.cli.doctor.checks import SEVERITIES, Finding, Severity, exit_code_of
from hypha.cli.doctor.gathered import Contact, Observations
from hypha.cli.doctor.subject import Subject
from hypha.cli.printing import shown
from hypha.naming import named

_STYLES: dict[Severity, str] = {"note": "dim", "warning": "yellow", "error": "bold red"}
_MBIT = 10**6 / 8


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
    trips = [one for one in contact.round_trips_s if math.isfinite(one)]
    words = [contact.name or contact.peer, contact.component]
    words += [f"{min(trips) * 1000:.1f} ms"] if trips else []
    words += [f"{_mbit(contact.up)} up"] if contact.up is not None else []
    words += [f"{_mbit(contact.down)} down at least"] if contact.down is not None else []
    return f"{'reached through a relay' if contact.relayed else 'reached'}: {', '.join(filter(None, words))}"


def as_json(subject: Subject, observed: Observations, findings: Sequence[Finding]) -> str:
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
    return msgspec.json.format(msgspec.json.encode(whole, order="sorted"), indent=2).decode()

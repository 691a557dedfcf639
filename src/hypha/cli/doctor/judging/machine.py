"""The machine below a node: files, disks, buffers, GPUs, versions; and the certificates that lie there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding, Severity
from hypha.cli.doctor.gathered import (
    Accelerators,
    Contact,
    Directory,
    IdentityObservations,
    MachineObservations,
)
from hypha.config.models import GatewayConfig, NodeConfig, WorkerConfig
from hypha.messages import Resources
from hypha.worker.limits.detecting import Claim, DetectedMachine, lowered
from hypha.worker.limits.gpus import Gpu

GB = 10**9
MB = 10**6
#: as the alert DiskAlmostFull
LITTLE_BYTES = 2 * GB
#: below it a worker offers nothing
NOTHING_BYTES = 32 << 20
SLOW_DISK = 5.0 * MB
#: beside its connections a node has some files open: logs, sockets, slices, executors' pipes
OTHER_FILES = 128
#: a leaf talks with its gateways and its job
LEAF_FILES = 512
#: CUDA's major version -> the first Linux driver that runs it (NVIDIA's release notes, table 3)
LEAST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
#: as the alerts CertificateExpiresSoon and CrlExpiresSoon
SOON = timedelta(days=14)
CRL_SOON = timedelta(days=3)
#: of what ends: its file, and what it is
_ENDING = {
    "certificate": ("cert", "this node's certificate"),
    "issuer": ("trust", "the certificate of the CA above this node's"),
    "crl": ("crls", "a revocation list"),
}


def judge_machine(observed: MachineObservations, config: NodeConfig | None) -> Iterator[Finding]:
    """All of it; ``config`` says what the node wants of the machine."""
    if observed.open_files is not None and config is not None:
        gateway = isinstance(config, GatewayConfig)
        needed = OTHER_FILES + config.max_connections if gateway else LEAF_FILES
        wants = f"max_connections is {config.max_connections}" if gateway else f"a node needs some {needed}"
        if observed.open_files < needed:
            yield checks.FILE_DESCRIPTORS.found(
                f"{observed.open_files} files may be open (`ulimit -n`), and {wants}"
            )
    for shortfall in observed.buffer_shortfalls:
        what, _, mend = shortfall.partition("; ")
        yield checks.SOCKET_BUFFERS.found(what, mend)
    for directory in observed.directories:
        yield from _directory(directory)
    if isinstance(config, WorkerConfig):
        yield from _resources(observed, config)
    if observed.accelerators is not None:
        wanted = config.resources.gpu if isinstance(config, WorkerConfig) else 0.0
        gpus = observed.has.gpus if observed.has is not None else ()
        yield from _accelerators(observed.accelerators, wanted, gpus)


def _directory(directory: Directory) -> Iterator[Finding]:
    place = f"{directory.key} ({directory.path})"
    if directory.problem:
        what = f"{place} cannot be written: {directory.problem}"
        yield checks.DIRECTORY.found(what, directory=directory.path)
    free = directory.free_bytes
    if free is not None and free < LITTLE_BYTES:
        severity: Severity = "error" if free < NOTHING_BYTES else "warning"
        what = f"{place} has {free / MB:.0f} MB left"
        yield checks.DISK_FULL.found(what, severity=severity, directory=directory.path)
    if directory.write_rate is not None and directory.write_rate < SLOW_DISK:
        rate = directory.write_rate / MB
        yield checks.DISK_SLOW.found(
            f"{rate:.1f} MB a second can be written to {place}", f"move {directory.key} to a faster disk"
        )


def offered_by(config: WorkerConfig, machine: DetectedMachine | None) -> tuple[Resources, tuple[Claim, ...]]:
    """What a worker offers of what it is configured to, and what of that is more than there is."""
    configured = Resources(**config.resources.model_dump())
    if machine is None:
        return configured, ()
    resources, claims = lowered(configured, machine)
    return (resources if config.detect_resources else configured), claims


def _resources(observed: MachineObservations, config: WorkerConfig) -> Iterator[Finding]:
    for claim in offered_by(config, observed.has)[1]:
        if claim.resource == "gpu" and not claim.used:
            continue  # reported with what torch can use
        instead = f"{claim.used:g} is offered instead" if config.detect_resources else "and is offered"
        yield checks.RESOURCES_MISSING.found(
            f"resources.{claim.resource} is {claim.asked:g}, more than this machine has ({claim.why}); "
            f"{instead}",
            f"set resources.{claim.resource} to {claim.used:g} or less",
        )


def _accelerators(found: Accelerators, wanted_gb: float, gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    if found.problem:
        yield checks.TORCH_BROKEN.found(found.problem)
        return
    if found.usable:
        return
    if found.driver and found.built_for:
        least = LEAST_DRIVER.get(_numbers(found.built_for)[0])
        if least is not None and _numbers(found.driver)[:2] < least:
            version = ".".join(map(str, least))
            yield checks.GPU_DRIVER.found(
                f"torch {found.torch} was built for CUDA {found.built_for}, which needs driver {version}, "
                f"and this machine has {found.driver}",
                version=version,
            )
            return
    if found.driver or gpus:
        why = "is built for none" if not found.built_for else "finds none that it can use"
        what = ", ".join(map(str, gpus)) or "a GPU"
        driver = f" with driver {found.driver}" if found.driver else ""
        yield checks.GPU_UNUSABLE.found(
            f"this machine has {what}{driver}, and torch {found.torch} {why}",
            severity="error" if wanted_gb else "warning",
        )
    elif wanted_gb:
        yield checks.GPU_UNUSABLE.found(
            f"resources.gpu is {wanted_gb:g} GB, and torch {found.torch} finds no GPU here",
            "set resources.gpu to 0, or look at the driver: `nvidia-smi`",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)) or (0,)


def judge_versions(own: dict[str, str], contacts: tuple[Contact, ...]) -> Iterator[Finding]:
    """Against those of peers: of Hypha, Python and what computes."""
    for contact in contacts:
        differing = {
            name: f"{name} {version} (here {own[name]})"
            for name, version in contact.packages.items()
            if name in own and _release(own[name]) != _release(version)
        }
        if differing:
            yield checks.VERSIONS_DIFFER.found(
                f"{contact.called} runs with {', '.join(differing.values())}",
                severity="warning" if "hypha" in differing else "note",
            )


def _release(version: str) -> tuple[str, ...]:
    """What of a version counts: the second number, too, and of a release of ours nothing after it."""
    return tuple(version.partition("+")[0].split(".")[:2])


def judge_identity(
    observed: IdentityObservations, component: str, require_roles: bool = True
) -> Iterator[Finding]:
    """All of it, for a node that is to be a ``component``."""
    files = observed.files
    told = set()
    if observed.key_mode is not None and observed.key_mode & 0o077:
        told.add("key_pem")
        yield checks.KEY_READABLE.found(
            f"others can read the private key {files.key} (mode {observed.key_mode:04o})", key_pem=files.key
        )
    if observed.begins is not None and observed.begins > observed.now:
        told.add("cert_pem")
        yield checks.CERTIFICATE_EXPIRED.found(
            f"this node's certificate {files.cert} is not valid before {observed.begins:%Y-%m-%d %H:%M} UTC, "
            f"and here it is {observed.now:%Y-%m-%d %H:%M}",
            "set the clock: `timedatectl set-ntp true`; or wait",
        )
    for what, end in observed.ends.items():
        yield from _ending(observed, what, f"{end:%Y-%m-%d %H:%M} UTC", end - observed.now)
        if what == "certificate" and end <= observed.now:
            told.add("cert_pem")
    for key, message in observed.problems:
        if key not in told:
            yield checks.CERTIFICATE_UNUSABLE.found(f"{key}: {message.rstrip('.')}")
    yield from _roles(observed, component, require_roles)


def _ending(observed: IdentityObservations, what: str, when: str, left: timedelta) -> Iterator[Finding]:
    key, words = _ENDING[what]
    place = getattr(observed.files, key)
    if what == "crl":
        if left < CRL_SOON:
            state = "is out of date since" if left <= timedelta() else "is out of date from"
            yield checks.CRL_OLD.found(f"{words} in {place} {state} {when}", crls_pem=place)
    elif left <= timedelta():
        renew = f"`hypha-certutil renew {observed.files.cert} --ca-cert <ca> --ca-key <key>`"
        yield checks.CERTIFICATE_EXPIRED.found(f"{words} ({place}) ended on {when}", renew)
    elif left < SOON:
        what = f"{words} ({place}) ends on {when}"
        yield checks.CERTIFICATE_EXPIRES.found(what, cert_pem=observed.files.cert)


def _roles(observed: IdentityObservations, component: str, require_roles: bool) -> Iterator[Finding]:
    if observed.roles is None or component in observed.roles or (not observed.roles and not require_roles):
        return
    has = " and ".join(sorted(observed.roles)) or "no role"
    yield checks.CERTIFICATE_ROLE.found(
        f"the certificate {observed.files.cert} carries {has}, and this node is to be a {component}",
        cert_pem=observed.files.cert,
        component=component,
    )

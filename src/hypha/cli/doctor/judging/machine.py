"""The machine below a node: files, disks, buffers, GPUs, versions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hypha.cli.doctor import checks
from hypha.cli.doctor.facts import Accelerators, Contact, Directory, MachineFacts
from hypha.cli.doctor.finding import Finding
from hypha.config.models import GatewayConfig, NodeConfig, WorkerConfig

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


def judge_machine(facts: MachineFacts, config: NodeConfig | None) -> Iterator[Finding]:
    """All of it; ``config`` says what the node wants of the machine."""
    yield from _files(facts, config)
    for directory in facts.directories:
        yield from _directory(directory)
    if isinstance(config, WorkerConfig):
        yield from _resources(facts, config)
    if facts.accelerators is not None:
        wanted = config.resources.gpu if isinstance(config, WorkerConfig) else 0.0
        yield from _accelerators(facts.accelerators, wanted)


def _files(facts: MachineFacts, config: NodeConfig | None) -> Iterator[Finding]:
    if facts.open_files is None or config is None:
        return
    gateway = isinstance(config, GatewayConfig)
    needed = OTHER_FILES + config.max_connections if gateway else LEAF_FILES
    if facts.open_files < needed:
        wants = f"max_connections is {config.max_connections}" if gateway else f"a node needs some {needed}"
        yield checks.FILE_DESCRIPTORS.found(
            f"{facts.open_files} files may be open (`ulimit -n`), and {wants}"
        )


def _directory(directory: Directory) -> Iterator[Finding]:
    place = f"{directory.key} ({directory.path})"
    if directory.problem:
        yield checks.DIRECTORY.found(
            f"{place} cannot be written: {directory.problem}",
            f"`chown $(id -un) {directory.path}`, or choose another {directory.key}",
        )
    free = directory.free_bytes
    if free is not None and free < LITTLE_BYTES:
        yield checks.DISK_FULL.found(
            f"{place} has {free / MB:.0f} MB left",
            f"make room in {directory.path}, or move {directory.key}",
            "error" if free < NOTHING_BYTES else "warning",
        )
    if directory.write_rate is not None and directory.write_rate < SLOW_DISK:
        rate = directory.write_rate / MB
        yield checks.DISK_SLOW.found(
            f"{rate:.1f} MB a second can be written to {place}", f"move {directory.key} to a faster disk"
        )


def _resources(facts: MachineFacts, config: WorkerConfig) -> Iterator[Finding]:
    if facts.has is None:
        return
    offers, has = config.resources, facts.has
    for name, unit in (("cpu", "cores"), ("memory", "GB"), ("gpu", "GB")):
        offered, there = getattr(offers, name), getattr(has, name)
        if name == "gpu" and not there:
            continue  # told with the GPU, if there is any
        if offered > there * 1.001:
            yield checks.RESOURCES_MISSING.found(
                f"resources.{name} is {offered:g} {unit}, and this machine has {there:.3g}",
                f"set resources.{name} to {there:.3g} or less",
            )
    # the cache lies on the same disk and is let go of for jobs; what it holds is not free any more
    kept = min(config.cache.max_gb, offers.storage)
    if offers.storage - kept > has.storage:
        yield checks.RESOURCES_MISSING.found(
            f"resources.storage is {offers.storage:g} GB, and work_dir has {has.storage:.3g} GB left",
            f"set resources.storage to {has.storage:.3g} or less, or move work_dir",
        )


def _accelerators(found: Accelerators, wanted_gb: float) -> Iterator[Finding]:
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
                f"upgrade the driver to at least {version}, or install a torch for an earlier CUDA",
            )
            return
    if found.driver:
        why = "has no CUDA in it" if not found.built_for else "finds none that it can use"
        yield checks.GPU_UNUSABLE.found(
            f"this machine has a GPU (driver {found.driver}), and torch {found.torch} {why}",
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
        differing = []
        for name, version in contact.packages.items():
            ours = own.get(name)
            if ours is not None and _release(name, ours) != _release(name, version):
                differing.append(f"{name} {version} (here {ours})")
        if differing:
            hypha = _release("hypha", own.get("hypha", "")) != _release(
                "hypha", contact.packages.get("hypha", own.get("hypha", ""))
            )
            yield checks.VERSIONS_DIFFER.found(
                f"{contact.name or contact.address} runs with {', '.join(differing)}",
                severity="warning" if hypha else "note",
            )


def _release(name: str, version: str) -> tuple[str, ...]:
    """What of a version counts: the second number, too, and of a release of ours nothing after it."""
    return tuple(version.partition("+")[0].split(".")[:2])

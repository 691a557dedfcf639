"""What lies on the disk: identity files, datasets to serve, the model of a job."""

from __future__ import annotations

import json
import math
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypha.cli.doctor.gathered import IdentityObservations, ServiceObservations
from hypha.config.job import JobConfig
from hypha.config.models import DataConfig, DatasetConfig
from hypha.data.manifest import MANIFEST_FILE, load_dataset_directory
from hypha.data.slices import SUFFIX
from hypha.decoding import decode
from hypha.errors import DataError, IdentityError, Undecodable
from hypha.pki.identity import Identity, IdentityFiles, load_identity
from hypha.pki.inspection import InspectedCertificate, describe


def gather_identity(files: IdentityFiles) -> tuple[IdentityObservations, Identity | None]:
    """What the files hold, and the identity where a node could be started with it. Blocks for a moment."""
    identity: Identity | None = None
    problems: tuple[tuple[str, str], ...] = ()
    try:
        identity = load_identity(files, warn=False)
    except IdentityError as exc:
        problems = tuple((one.key, f"{one.source}: {one.message}") for one in exc.problems)
    own = _own_certificate(files)
    ends = {} if own is None else {"certificate": own.not_after}
    if identity is not None:
        ends |= identity.expirations()
    roles = None if own is None else frozenset(own.roles)
    observed = IdentityObservations(
        files=files,
        now=datetime.now(UTC),
        peer=identity.peer_id if identity is not None else (own.peer_id or "" if own is not None else ""),
        roles=roles,
        key_mode=_mode(files),
        begins=None if own is None else own.not_before,
        ends=ends,
        problems=problems,
    )
    return observed, identity


def _own_certificate(files: IdentityFiles) -> InspectedCertificate | None:
    try:
        return describe(files.cert).certificates[0]
    except (IdentityError, IndexError):
        return None  # among the problems


def _mode(files: IdentityFiles) -> int | None:
    try:
        return stat.S_IMODE(files.key.stat().st_mode)
    except OSError:
        return None


def gather_served(config: DataConfig) -> ServiceObservations:
    """Reads manifests and looks for the slices; hashes nothing. Blocks for a moment."""
    entries = [*config.datasets, *([DatasetConfig(path=config.dataset_path)] if config.dataset_path else [])]
    names: list[str] = []
    unusable: list[tuple[str, str]] = []
    for entry in entries:
        try:
            names.append(_name_of(entry))
        except DataError as exc:
            unusable.append((str(entry.path), "; ".join(str(exc).splitlines())))
    return ServiceObservations(tuple(names), tuple(unusable))


def _name_of(entry: DatasetConfig) -> str:
    """Raises DataError where it cannot be served."""
    if (entry.path / MANIFEST_FILE).exists():
        return load_dataset_directory(entry.path, entry.name).name
    if not any(entry.path.glob(f"*{SUFFIX}")):
        raise DataError(f"it holds neither {MANIFEST_FILE} nor any slice")
    # the node makes a manifest when it starts, which takes its time
    return entry.name or entry.path.resolve().name


#: the format's own limit is 100 MB; headers have some kilobytes
_MAX_HEADER_BYTES = 16 << 20


def parameters_of(job: JobConfig) -> int | None:
    """Numbers in all tensors of the model's safetensors files, where its directory is here and has any."""
    if job.model.path is None or not job.model.path.is_dir():
        return None
    counts = [_numbers(path) for path in sorted(job.model.path.glob("*.safetensors"))]
    return sum(counts) or None


def _numbers(path: Path) -> int:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: Any = decode(json.loads, file.read(min(size, _MAX_HEADER_BYTES)))
        return sum(math.prod(one["shape"]) for key, one in header.items() if key != "__metadata__")
    except (OSError, Undecodable, AttributeError, KeyError, TypeError):
        return 0

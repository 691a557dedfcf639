"""Certificates, keys, trust and revocation lists, as they lie on the disk."""

from __future__ import annotations

import stat
from datetime import UTC, datetime

from hypha.cli.doctor.gathered import IdentityObservations
from hypha.errors import IdentityError
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

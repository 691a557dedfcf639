"""What a certificate says of Hypha, and what is wrong with it or with its key, good or not: for people."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hypha.errors import IdentityError
from hypha.pki.certificates import (
    ed25519_key_of,
    is_ca,
    peer_id_of_key,
    roles_in,
    roles_issued_by,
    validity_problem,
)


@dataclass(frozen=True)
class InspectedCertificate:
    """``peer_id`` is ``None`` for CAs and for keys that are not Ed25519; ``may_issue`` are the roles that a
    CA is limited to, ``None`` where it is not; ``problems`` are sentences, empty when all is well.
    """

    certificate: x509.Certificate
    peer_id: str | None
    roles: frozenset[str]
    may_issue: frozenset[str] | None
    problems: tuple[str, ...]


def inspected(certificate: x509.Certificate) -> InspectedCertificate:
    peer_id, roles, may_issue = None, frozenset[str](), None
    problem = validity_problem(certificate, datetime.now(UTC))
    problems = [] if problem is None else [problem]
    try:
        if is_ca(certificate):
            may_issue = roles_issued_by(certificate)
        else:
            peer_id = peer_id_of_key(ed25519_key_of(certificate))
            roles = roles_in(certificate)
    except IdentityError as exc:
        problems.append(exc.problems[0].message)
    return InspectedCertificate(certificate, peer_id, roles, may_issue, tuple(problems))


def names_in(certificate: x509.Certificate) -> tuple[str, ...]:
    """All names besides its subject."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return tuple(str(name.value) for name in names)


def key_beside(path: Path) -> Path | None:
    """The private key of the certificate in ``path``, where it lies beside it."""
    key = path.with_name(path.name.removesuffix("-cert.pem") + "-key.pem")
    return key if path.name.endswith("-cert.pem") and key.exists() else None


def key_problems(path: Path, certificate: x509.Certificate) -> list[str]:
    """What is wrong with the private key of ``certificate`` in ``path``, in sentences."""
    problems = []
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            problems.append(f"{path}: others can read the key (mode {mode:04o}); run `chmod 600 {path}`")
        key = load_pem_private_key(path.read_bytes(), password=None)
        if key.public_key() != certificate.public_key():
            problems.append(f"{path}: the key does not belong to the certificate")
    except OSError as exc:
        problems.append(f"{path}: the key cannot be read ({exc.strerror})")
    except (ValueError, TypeError) as exc:
        problems.append(f"{path}: this is no usable private key: {exc}")
    return problems

"""What a certificate file says, as values for people to read (``hypha-certutil show``)."""

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
    fingerprint,
    is_ca,
    is_self_signed,
    peer_id_of_key,
    roles_in,
    roles_issued_by,
    validity_problem,
)
from hypha.pki.issuers import load_chain


@dataclass(frozen=True)
class InspectedCertificate:
    """One certificate. ``peer_id`` is ``None`` for CAs and for keys that are not Ed25519; ``may_issue`` are
    the roles that a CA is limited to, ``None`` where it is not; ``problems`` are sentences, empty when all
    is well.
    """

    subject: str
    issuer: str
    serial: str
    not_before: datetime
    not_after: datetime
    is_ca: bool
    is_root: bool
    roles: tuple[str, ...]
    names: tuple[str, ...]
    peer_id: str | None
    fingerprint: str
    problems: tuple[str, ...]
    may_issue: tuple[str, ...] | None = None


@dataclass(frozen=True)
class InspectedFile:
    """One file: its certificates in order, and what is wrong with the key beside it (``key`` is
    ``None`` when there is none).
    """

    path: Path
    certificates: tuple[InspectedCertificate, ...]
    key: Path | None
    key_problems: tuple[str, ...]


def describe(path: Path) -> InspectedFile:
    """What is known of every certificate in the PEM file ``path``; IdentityError when there is none."""
    certificates = load_chain(path)
    key = path.with_name(path.name.removesuffix("-cert.pem") + "-key.pem")
    has_key = path.name.endswith("-cert.pem") and key.exists()
    return InspectedFile(
        path=path,
        certificates=tuple(_inspected(certificate) for certificate in certificates),
        key=key if has_key else None,
        key_problems=_key_problems(key, certificates[0]) if has_key else (),
    )


def _inspected(certificate: x509.Certificate) -> InspectedCertificate:
    authority = is_ca(certificate)
    problems = []
    peer_id = None
    roles: frozenset[str] = frozenset()
    limit: frozenset[str] | None = None
    if (problem := validity_problem(certificate, datetime.now(UTC))) is not None:
        problems.append(problem)
    try:
        if authority:
            limit = roles_issued_by(certificate)
        else:
            peer_id = peer_id_of_key(ed25519_key_of(certificate))
            roles = roles_in(certificate)
    except IdentityError as exc:
        problems.append(exc.problems[0].message)
    return InspectedCertificate(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        is_ca=authority,
        is_root=authority and is_self_signed(certificate),
        roles=tuple(sorted(roles)),
        names=_names(certificate),
        peer_id=peer_id,
        fingerprint=fingerprint(certificate),
        problems=tuple(problems),
        may_issue=None if limit is None else tuple(sorted(limit)),
    )


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return tuple(str(name.value) for name in names)


def _key_problems(path: Path, certificate: x509.Certificate) -> tuple[str, ...]:
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
    return tuple(problems)

"""Certificates, keys, trust and revocation lists."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from hypha.cli.doctor import checks
from hypha.cli.doctor.finding import Finding
from hypha.cli.doctor.gathered import IdentityObservations

#: as the alerts CertificateExpiresSoon and CrlExpiresSoon
SOON = timedelta(days=14)
CRL_SOON = timedelta(days=3)
_FILES = {"certificate": "cert_pem", "issuer": "trust_pem", "crl": "crls_pem"}
_WORDS = {
    "certificate": "this node's certificate",
    "issuer": "the certificate of the CA above this node's",
    "crl": "a revocation list",
}


def judge_identity(
    observed: IdentityObservations, component: str, require_roles: bool = True
) -> Iterator[Finding]:
    """All of it, for a node that is to be a ``component``."""
    files = observed.files
    told = set()
    if observed.key_mode is not None and observed.key_mode & 0o077:
        told.add("key_pem")
        yield checks.KEY_READABLE.found(
            f"others can read the private key {files.key} (mode {observed.key_mode:04o})",
            f"`chmod 600 {files.key}`",
        )
    if observed.begins is not None and observed.begins > observed.now:
        told.add("cert_pem")
        yield checks.CERTIFICATE_EXPIRED.found(
            f"this node's certificate {files.cert} is not valid before {observed.begins:%Y-%m-%d %H:%M} UTC, "
            f"and here it is {observed.now:%Y-%m-%d %H:%M}",
            "set the clock: `timedatectl set-ntp true`; or wait",
        )
    renew = f"`hypha-certutil renew {files.cert} --ca-cert <ca> --ca-key <key>`"
    for what, end in observed.ends.items():
        yield from _ending(observed, what, f"{end:%Y-%m-%d %H:%M} UTC", end - observed.now, renew)
        if what == "certificate" and end <= observed.now:
            told.add("cert_pem")
    for key, message in observed.problems:
        if key not in told:
            yield checks.CERTIFICATE_UNUSABLE.found(f"{key}: {message.rstrip('.')}")
    yield from _roles(observed, component, require_roles)


def _ending(
    observed: IdentityObservations, what: str, when: str, left: timedelta, renew: str
) -> Iterator[Finding]:
    place = getattr(observed.files, _FILES[what].removesuffix("_pem"))
    if what == "crl":
        if left < CRL_SOON:
            state = "is out of date since" if left <= timedelta() else "is out of date from"
            yield checks.CRL_OLD.found(
                f"a revocation list in {place} {state} {when}",
                f"`hypha-certutil revoke --ca-cert <ca> --ca-key <key> --crl {place}`, then copy it to all",
            )
    elif left <= timedelta():
        yield checks.CERTIFICATE_EXPIRED.found(f"{_WORDS[what]} ({place}) ended on {when}", renew)
    elif left < SOON:
        yield checks.CERTIFICATE_EXPIRES.found(f"{_WORDS[what]} ({place}) ends on {when}", renew)


def _roles(observed: IdentityObservations, component: str, require_roles: bool) -> Iterator[Finding]:
    if observed.roles is None or component in observed.roles or (not observed.roles and not require_roles):
        return
    has = " and ".join(sorted(observed.roles)) or "no role"
    yield checks.CERTIFICATE_ROLE.found(
        f"the certificate {observed.files.cert} carries {has}, and this node is to be a {component}",
        f"`hypha-certutil renew {observed.files.cert} --role {component} --ca-cert <ca> --ca-key <key>`",
    )

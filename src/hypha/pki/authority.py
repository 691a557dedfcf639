"""Making certificates: a root, organisations under it, nodes under those, and revocation lists.

All Ed25519, PKCS#8 and plain X.509 v3, strict enough for ``openssl verify -x509_strict``. Private keys
are 0600 from their first byte, certificates 0644. Nothing existing is ever overwritten (but a CRL, and
a certificate that is renewed, which is kept beside its CA), and a set of files appears whole or not at all.

Names: a root writes ``<slug>-ca-cert.pem`` and ``-ca-key.pem``, an organisation these and
``-ca-trust.pem``, a node ``<slug>-cert.pem``, ``-key.pem`` and ``-trust.pem``. A trust file holds the
organisation's CA and everything above it. ``<slug>-ca-renewed.pem`` holds certificates that were renewed and
have not ended: whoever has one may still use it, so revoking its successor revokes it, too. It is one module
as all of it writes the same few files, under the same rules.
"""

from __future__ import annotations

import ipaddress
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hypha.access import ROLES, carries
from hypha.errors import IdentityError
from hypha.pki.certificates import (
    LIMIT_PREFIX,
    ROLE_PREFIX,
    attribute_of,
    ed25519_key_of,
    is_ca,
    issued_by,
    name_of,
    organization_of,
    path_length,
    roles_in,
    roles_issued_by,
)
from hypha.pki.issuers import (
    Authority,
    CaFiles,
    digest_for,
    key_identifier_of,
    load_authority,
    load_certificate,
    load_chain,
    replace_file,
    sign,
    write_new,
)

__all__ = ["CaFiles", "MadeFiles", "make_node", "make_org", "make_root", "renew_node", "revoke"]

ROOT_DAYS = 3650
ORG_DAYS = 1825
NODE_DAYS = 365
CRL_DAYS = 30


@dataclass(frozen=True)
class MadeFiles:
    """What was written. ``trust`` is ``None`` for a root."""

    cert: Path
    key: Path
    trust: Path | None = None


def make_root(
    organization: str,
    directory: Path,
    *,
    name: str | None = None,
    country: str | None = None,
    days: int = ROOT_DAYS,
) -> MadeFiles:
    """A self-signed root CA called ``name`` (default ``<organization> Root CA``)."""
    stem = _ca_stem(name or organization)
    made = _files(directory, stem, _clash(stem), trust=False)
    key = Ed25519PrivateKey.generate()
    subject = _subject(name or f"{organization} Root CA", organization, country or "")
    builder = _builder(subject, key.public_key(), days, None)
    return _written(made, key, _constrained(builder, ca=True).sign(key, None))


def make_org(
    organization: str,
    ca: CaFiles,
    directory: Path,
    *,
    name: str | None = None,
    days: int = ORG_DAYS,
    roles: Collection[str] = (),
) -> MadeFiles:
    """An organisation's CA (default name ``<organization> CA``), which may issue nodes but no CAs. With
    ``roles`` every node refuses certificates of it that carry another role, or none.
    """
    _check_roles(roles)
    authority = load_authority(ca)
    if path_length(authority.certificate) == 0:
        raise IdentityError(
            f"{ca.cert}: this CA may only issue nodes, no organisation (path length 0); use the root"
        )
    stem = _ca_stem(name or organization)
    made = _files(directory, stem, _clash(stem))
    country = attribute_of(authority.certificate, NameOID.COUNTRY_NAME)
    subject = _subject(name or f"{organization} CA", organization, country)
    if subject == authority.certificate.subject:
        raise IdentityError(
            f"{ca.cert}: the organisation would have the very name of its root, {subject.rfc4514_string()}, "
            "and chains could not tell them apart; give it another name"
        )
    key = Ed25519PrivateKey.generate()
    builder = _builder(subject, key.public_key(), days, authority)
    if roles:
        limits = x509.SubjectAlternativeName(_uris(LIMIT_PREFIX, roles))
        # not critical: nodes of an older version and OpenSSL do not know it, and would refuse the whole CA
        builder = builder.add_extension(limits, critical=False)
    certificate = sign(_constrained(builder, ca=True, limit=0), authority.key)
    return _written(made, key, certificate, (certificate, *authority.bundle))


def make_node(
    name: str,
    ca: CaFiles,
    directory: Path,
    *,
    roles: Collection[str] = (),
    san: Sequence[str] = (),
    days: int = NODE_DAYS,
) -> MadeFiles:
    """A node's certificate: ``roles`` it may play (none: any, where nodes accept that), ``san`` DNS names, IP
    addresses or URIs (none are needed).
    """
    authority = load_authority(ca)
    _check_roles(roles)
    if told := [entry for entry in san if entry.lower().startswith("urn:hypha:")]:
        raise IdentityError(f"{told[0]}: roles are no names; say them with the role option")
    _check_limit(ca, authority, frozenset(roles))
    made = _files(directory, _slug(name), "give the node another name")
    above = authority.certificate
    subject = _subject(name, organization_of(above), attribute_of(above, NameOID.COUNTRY_NAME))
    key = Ed25519PrivateKey.generate()
    names = [*_uris(ROLE_PREFIX, roles), *(_general_name(entry) for entry in san)]
    certificate = _issue_node(authority, subject, key.public_key(), names, days)
    return _written(made, key, certificate, authority.bundle)


def renew_node(
    cert: Path, ca: CaFiles, *, days: int = NODE_DAYS, roles: Collection[str] = ()
) -> x509.Certificate:
    """Replace the first certificate in ``cert`` by one of the same key, subject and names with new dates: the
    PeerID stays. What follows it in the file, and the file's owner and mode, stay too. The earlier one is
    kept beside the CA's certificate, for :func:`revoke`. With ``roles`` the new one carries these, and not
    those of the earlier one.
    """
    _check_roles(roles)
    authority = load_authority(ca, above=False)
    old, *chain = load_chain(cert)
    try:
        names = list(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        names = []
    if is_ca(old):
        raise IdentityError(f"{cert}: this is a CA; only node certificates are renewed")
    if old.issuer != authority.certificate.subject or not issued_by(old, authority.certificate):
        raise IdentityError(f"{cert}: {name_of(authority.certificate)} did not issue it; use the CA that did")
    if roles:
        names = [*_uris(ROLE_PREFIX, roles), *(name for name in names if not _is_role(name))]
    _check_limit(ca, authority, frozenset(roles) or roles_in(old))
    certificate = _issue_node(authority, old.subject, ed25519_key_of(old), names, days)
    now = datetime.now(UTC)
    kept = [one for one in (*_renewed(ca), old) if one.not_valid_after_utc > now]
    replace_file(_renewed_path(ca), _pem(*kept), 0o644)
    replace_file(cert, _pem(certificate, *chain), 0o644)
    return certificate


def revoke(ca: CaFiles, certificates: Sequence[Path], crl: Path, *, days: int = CRL_DAYS) -> int:
    """Add ``certificates`` of ``ca``, and the earlier ones of those that were renewed, to the revocation list
    ``crl`` (made when missing), signed anew and valid for ``days``. Returns how many it lists now.
    """
    authority = load_authority(ca, above=False)
    now = datetime.now(UTC).replace(microsecond=0)
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    entries: dict[int, x509.RevokedCertificate] = {}
    number = 1
    if crl.exists():
        try:
            old = x509.load_pem_x509_crl(crl.read_bytes())
        except ValueError as exc:
            raise IdentityError(f"{crl}: this is no revocation list in PEM form: {exc}") from exc
        if old.issuer != authority.certificate.subject:
            raise IdentityError(
                f"{crl}: it belongs to {old.issuer.rfc4514_string()}; give each CA its own list"
            )
        entries = {entry.serial_number: entry for entry in old}
        try:
            number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1
        except x509.ExtensionNotFound:
            number = 2
    for path in certificates:
        certificate = load_certificate(path)
        if not issued_by(certificate, authority.certificate):
            raise IdentityError(
                f"{path}: {name_of(authority.certificate)} did not issue it and cannot revoke it"
            )
        key = certificate.public_key()
        for one in (certificate, *(earlier for earlier in _renewed(ca) if earlier.public_key() == key)):
            entries.setdefault(
                one.serial_number,
                x509.RevokedCertificateBuilder()
                .serial_number(one.serial_number)
                .revocation_date(now)
                .build(),
            )
    for entry in entries.values():
        builder = builder.add_revoked_certificate(entry)
    builder = (
        builder.last_update(now)
        .next_update(now + timedelta(days=days))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(key_identifier_of(authority.certificate), critical=False)
    )
    signed = builder.sign(authority.key, digest_for(authority.key))
    replace_file(crl, signed.public_bytes(Encoding.PEM), 0o644)
    return len(entries)


def _renewed_path(ca: CaFiles) -> Path:
    return ca.cert.with_name(f"{ca.cert.stem.removesuffix('-cert')}-renewed.pem")


def _renewed(ca: CaFiles) -> list[x509.Certificate]:
    path = _renewed_path(ca)
    # empty once all that it held have ended
    return load_chain(path) if path.exists() and path.stat().st_size else []


def _check_roles(roles: Collection[str]) -> None:
    if unknown := sorted(set(roles) - set(ROLES)):
        raise IdentityError(f"there is no role {', '.join(unknown)}; roles are {', '.join(ROLES)}")


def _check_limit(ca: CaFiles, authority: Authority, roles: frozenset[str]) -> None:
    """Nobody is given a certificate that every node would refuse."""
    for one in authority.bundle:
        limit = roles_issued_by(one)
        if limit is not None and not (roles and roles <= limit):
            raise IdentityError(
                f"{ca.cert}: {name_of(one)} may only vouch for {carries(limit)}, and this certificate would "
                f"carry {carries(roles)}; choose its role among these"
            )


def _uris(prefix: str, roles: Collection[str]) -> list[x509.GeneralName]:
    return [x509.UniformResourceIdentifier(f"{prefix}{role}") for role in ROLES if role in roles]


def _is_role(name: x509.GeneralName) -> bool:
    return isinstance(name, x509.UniformResourceIdentifier) and name.value.lower().startswith(ROLE_PREFIX)


def _issue_node(
    authority: Authority,
    subject: x509.Name,
    key: Ed25519PublicKey,
    names: Sequence[x509.GeneralName],
    days: int,
) -> x509.Certificate:
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _constrained(_builder(subject, key, days, authority), ca=False)
    builder = builder.add_extension(usages, critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return sign(builder, authority.key)


def _builder(
    subject: x509.Name, key: Ed25519PublicKey, days: int, authority: Authority | None
) -> x509.CertificateBuilder:
    """What all certificates have; without an ``authority`` it is issued by itself."""
    if days < 1:
        raise IdentityError(f"a certificate must be valid for at least one day, not {days}")
    now = datetime.now(UTC).replace(microsecond=0)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # a day back: machines whose clock is slow shall not refuse a new certificate
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    if authority is not None:
        builder = builder.add_extension(key_identifier_of(authority.certificate), critical=False)
    return builder


def _constrained(
    builder: x509.CertificateBuilder, *, ca: bool, limit: int | None = None
) -> x509.CertificateBuilder:
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        # RFC 8410: an Ed25519 key signs, it agrees on nothing
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
    constraints = x509.BasicConstraints(ca=ca, path_length=limit)
    return builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)


def _files(directory: Path, stem: str, advice: str, *, trust: bool = True) -> MadeFiles:
    """What is going to be written; IdentityError, with ``advice``, where any of it is there already."""
    cert, key, bundle = (directory / f"{stem}-{kind}.pem" for kind in ("cert", "key", "trust"))
    if there := [
        str(path) for path in ((cert, key, bundle) if trust else (cert, key)) if os.path.lexists(path)
    ]:
        raise IdentityError(f"{', '.join(there)}: already there, and nothing is overwritten; {advice}")
    return MadeFiles(cert, key, bundle if trust else None)


def _written(
    made: MadeFiles,
    key: Ed25519PrivateKey,
    certificate: x509.Certificate,
    trust: tuple[x509.Certificate, ...] = (),
) -> MadeFiles:
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    files = [(made.key, key_pem, 0o600), (made.cert, _pem(certificate), 0o644)]
    if made.trust is not None:
        files.append((made.trust, _pem(*trust), 0o644))
    write_new(files)
    return made


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _subject(common_name: str, organization: str, country: str) -> x509.Name:
    try:
        attributes = [x509.NameAttribute(NameOID.COUNTRY_NAME, country)] if country else []
        if organization:
            attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    except ValueError as exc:
        raise IdentityError(f"this cannot be the name of a certificate: {exc}") from exc


def _general_name(entry: str) -> x509.GeneralName:
    try:
        if "://" in entry or entry.startswith("urn:"):
            return x509.UniformResourceIdentifier(entry)
        try:
            return x509.IPAddress(ipaddress.ip_address(entry))
        except ValueError:
            return x509.DNSName(entry)
    except ValueError as exc:
        raise IdentityError(f"{entry!r} is neither a DNS name nor an IP address nor a URI: {exc}") from exc


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if not slug:
        raise IdentityError(f"no file name can be made of {name!r}; use some letters or digits")
    return slug


def _ca_stem(name: str) -> str:
    slug = _slug(name)
    return slug if slug.endswith("-ca") else f"{slug}-ca"


def _clash(stem: str) -> str:
    return (
        f"a root and an organisation of one name would share the file names {stem}-*.pem; "
        "give one of them another name or directory"
    )

"""Facts about X.509 certificates, and the rules by which one of them is trusted.

Everything here is pure: bytes, certificates and a point in time go in, facts or an
:class:`IdentityError` come out. Paths are built by issuer name and signature from a certificate to any
CA of a trust bundle; every CA in a bundle is an anchor, so a bundle that holds only an organisation's
CA trusts that organisation and nobody else under its root.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice

import base58
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from hypha.access import carries
from hypha.errors import IdentityError

#: URI names of a node's certificate: the roles that it may play.
ROLE_PREFIX = "urn:hypha:role:"
#: URI names of a CA's certificate: the roles that nodes under it may play. X.509's own name constraints
#: cannot say that: for URIs they are about the host, which these have not, and OpenSSL refuses the chain.
LIMIT_PREFIX = "urn:hypha:may-issue:"

#: A peer may present a few intermediates; more than this is somebody making us work.
MAX_PATH = 8
#: Paths looked at before giving up: cross-signed CAs could otherwise make exponentially many.
MAX_TRIES = 64


def peer_id_of_key(key: Ed25519PublicKey) -> str:
    """The libp2p PeerID of a key: base58 of an identity multihash of the protobuf {Ed25519, 32 bytes}."""
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    encoded: bytes = base58.b58encode(b"\x00\x24\x08\x01\x12\x20" + raw)
    return encoded.decode("ascii")


def parse_der(certificate_der: bytes) -> x509.Certificate:
    """The certificate, or IdentityError."""
    try:
        return _with_names(x509.load_der_x509_certificate(certificate_der))
    except ValueError as exc:
        raise IdentityError(f"this is no X.509 certificate: {exc}") from exc


def parse_pem(data: bytes) -> list[x509.Certificate]:
    """All certificates in ``data``, of which there is one. Raises ValueError."""
    return [_with_names(one) for one in x509.load_pem_x509_certificates(data)]


def _with_names(certificate: x509.Certificate) -> x509.Certificate:
    # the library reads names when they are asked for, which is where a path is looked for
    _ = certificate.issuer, certificate.subject
    return certificate


def ed25519_key_of(certificate: x509.Certificate) -> Ed25519PublicKey:
    """The certificate's key, or IdentityError when it is of another kind."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise IdentityError(f"the key in certificate {name_of(certificate)} cannot be read: {exc}") from exc
    if not isinstance(key, Ed25519PublicKey):
        kind = type(key).__name__.removesuffix("PublicKey").strip("_")
        raise IdentityError(
            f"certificate {name_of(certificate)} holds a {kind} key; node certificates must be Ed25519 "
            "(`openssl genpkey -algorithm ed25519`)"
        )
    return key


def roles_in(certificate: x509.Certificate) -> frozenset[str]:
    """Roles from URI names ``urn:hypha:role:<role>``, as they are written; empty means any (unless a node
    requires roles).

    Unknown ones are kept, and so is a whole name that only resembles such a one (another case): dropping
    them would turn "may only be X" into "may be anything".
    """
    return _marked(certificate, ROLE_PREFIX)


def roles_issued_by(ca: x509.Certificate) -> frozenset[str] | None:
    """The roles that ``ca`` is limited to, from its URI names ``urn:hypha:may-issue:<role>``; ``None``: it is
    not limited. IdentityError when its names cannot be read.
    """
    return _marked(ca, LIMIT_PREFIX) or None


def _marked(certificate: x509.Certificate, prefix: str) -> frozenset[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        return frozenset()
    except (ValueError, x509.DuplicateExtension) as exc:
        raise IdentityError(f"certificate {name_of(certificate)} has broken extensions: {exc}") from exc
    return frozenset(uri.removeprefix(prefix) for uri in uris if uri.lower().startswith(prefix))


def presented_chain(tls: ssl.SSLSocket | ssl.SSLObject) -> tuple[bytes, ...]:
    """The certificates (DER) that the peer sent in its handshake, its own first; empty before it."""
    # public only from Python 3.13 on; the same C function is there, unnamed, since 3.10
    owner = tls if hasattr(tls, "get_unverified_chain") else getattr(tls, "_sslobj", None)
    chain = owner.get_unverified_chain() if owner is not None else None
    found: list[bytes] = []
    for entry in chain or ():
        der = entry if isinstance(entry, bytes) else ssl.PEM_cert_to_DER_cert(entry.public_bytes())
        if der not in found:
            found.append(der)
    return tuple(found)


def name_of(certificate: x509.Certificate) -> str:
    """Its subject as people write it, for messages."""
    return certificate.subject.rfc4514_string() or "(no subject)"


def common_name_of(certificate: x509.Certificate) -> str:
    """The common name of its subject, as its authority wrote it; empty where it has none."""
    return attribute_of(certificate, NameOID.COMMON_NAME)


def organization_of(certificate: x509.Certificate) -> str:
    """The organisation of its subject; empty where it has none."""
    return attribute_of(certificate, NameOID.ORGANIZATION_NAME)


def attribute_of(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> str:
    """An attribute of its subject; empty where it has none."""
    try:
        return "".join(str(one.value) for one in certificate.subject.get_attributes_for_oid(oid)[:1])
    except ValueError:
        # a subject that cannot be decoded has no name
        return ""


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 over the whole certificate, hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether it says that it may issue certificates (basic constraints, and key usage where there)."""
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            return False
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound as missing:
        return missing.oid != x509.BasicConstraints.oid
    except (ValueError, x509.DuplicateExtension):
        return False


def claims_to_issue(certificate: x509.Certificate) -> bool:
    """Whether anything in it says that it may issue certificates, so that it cannot be a node's.
    IdentityError when its extensions cannot be read.
    """
    try:
        for extension in certificate.extensions:
            value = extension.value
            if isinstance(value, x509.BasicConstraints) and value.ca:
                return True
            if isinstance(value, x509.KeyUsage) and value.key_cert_sign:
                return True
    except (ValueError, x509.DuplicateExtension) as exc:
        raise IdentityError(f"certificate {name_of(certificate)} has broken extensions: {exc}") from exc
    return False


def path_length(certificate: x509.Certificate) -> int | None:
    """How many CAs may follow under this one; ``None`` for no limit."""
    return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length


def is_self_signed(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and issued_by(certificate, certificate)


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Name and signature match."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def validity_problem(certificate: x509.Certificate, now: datetime) -> str | None:
    """What is wrong with its dates, in words."""
    if now < certificate.not_valid_before_utc:
        return (
            f"certificate {name_of(certificate)} is not valid before "
            f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is this machine's clock right?"
        )
    if now > certificate.not_valid_after_utc:
        return (
            f"certificate {name_of(certificate)} expired on "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; have it renewed by its authority"
        )
    return None


@dataclass(frozen=True)
class TrustRules:
    """What a node believes: CA certificates, and the revocation lists it was given.

    OpenSSL's own CRL flags are not used on purpose: they refuse *everybody* as soon as one list of one
    CA in a chain is missing. Here a list that is there is obeyed (and must carry its CA's signature),
    one that is missing revokes nobody, and one past its ``next update`` still revokes.
    """

    anchors: tuple[x509.Certificate, ...]
    crls: tuple[x509.CertificateRevocationList, ...] = ()

    def organization(self, path: Sequence[x509.Certificate]) -> str:
        """The organisation that vouches for the leaf of a ``path``, as :meth:`check` has returned it.

        It is that of the highest CA below a root of the trust bundle, or that of the CA in the bundle itself.
        Never that of the leaf, into which its CA writes what it likes, nor of anything above the bundle's
        CAs, which the peer may have made.
        """
        last = max(depth for depth, one in enumerate(path) if depth and one in self.anchors)
        top = path[last]
        return organization_of(path[last - 1] if last > 1 and is_self_signed(top) else top)

    def check(
        self, leaf: x509.Certificate, others: Sequence[x509.Certificate] = ()
    ) -> tuple[x509.Certificate, ...]:
        """The path from ``leaf`` to an anchor and on to its root where known, leaf first.

        ``others`` are candidates for intermediates that need not be trusted. Raises IdentityError that
        names the first reason found on the path that came nearest to being good.
        """
        now = datetime.now(UTC)
        problem = validity_problem(leaf, now)
        if problem is None and claims_to_issue(leaf):
            problem = (
                f"certificate {name_of(leaf)} is one of a CA, which a node may not use; make a node's with "
                "`hypha-certutil node`"
            )
        if problem is None and is_self_signed(leaf):
            problem = f"certificate {name_of(leaf)} is self-signed; no authority vouches for it"
        if problem is None:
            problem = (
                f"certificate {name_of(leaf)} (issuer {leaf.issuer.rfc4514_string()}) does not chain to any "
                "CA in the trust bundle; it must hold the issuing organisation's CA or its root"
            )
            usable = [ca for ca in (*self.anchors, *others) if is_ca(ca)]
            for path in islice(_paths((leaf,), usable), MAX_TRIES):
                reason = self._path_problem(path, now)
                if reason is None:
                    return path
                problem = reason
        raise IdentityError(problem)

    def _path_problem(self, path: tuple[x509.Certificate, ...], now: datetime) -> str | None:
        anchored = next((depth for depth, one in enumerate(path) if depth and one in self.anchors), None)
        if anchored is None:
            return f"certificate {name_of(path[0])} chains to {name_of(path[-1])}, which is not trusted here"
        for depth, certificate in enumerate(path):
            if depth <= anchored and (problem := validity_problem(certificate, now)) is not None:
                return problem
            limit = path_length(certificate) if depth else None
            if limit is not None and depth - 1 > limit:
                return f"CA {name_of(certificate)} allows {limit} CAs below it, the chain has {depth - 1}"
            if depth and (problem := _beyond_limit(path[0], certificate)) is not None:
                return problem
            issuer = path[depth + 1] if depth + 1 < len(path) else None
            if issuer is not None and self._revoked(certificate, issuer):
                return f"certificate {name_of(certificate)} was revoked by {name_of(issuer)}"
        return None

    def _revoked(self, certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
        return any(
            crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
            and crl_signed_by(crl, issuer)
            for crl in self.crls
            if crl.issuer == issuer.subject
        )


def _beyond_limit(leaf: x509.Certificate, ca: x509.Certificate) -> str | None:
    """Why ``ca`` may not vouch for the roles of ``leaf``, in words."""
    try:
        limit, roles = roles_issued_by(ca), roles_in(leaf)
    except IdentityError as exc:
        return exc.problems[0].message
    if limit is None or (roles and roles <= limit):
        return None
    return (
        f"CA {name_of(ca)} may only vouch for {carries(limit)}, and {name_of(leaf)} carries {carries(roles)}"
    )


def crl_signed_by(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _paths(
    start: tuple[x509.Certificate, ...], candidates: Iterable[x509.Certificate]
) -> Iterator[tuple[x509.Certificate, ...]]:
    """All paths upwards from ``start`` that cannot be made longer, the leaf first."""
    tip = start[-1]
    extended = False
    if len(start) < MAX_PATH and not (len(start) > 1 and is_self_signed(tip)):
        seen: set[x509.Certificate] = set()
        for ca in candidates:
            if ca not in seen and ca.subject == tip.issuer and ca not in start and issued_by(tip, ca):
                seen.add(ca)
                extended = True
                yield from _paths((*start, ca), candidates)
    if not extended and len(start) > 1:
        yield start

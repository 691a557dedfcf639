"""A node's identity: its certificate, key, trust bundle and revocation lists, loaded and checked.

What is loaded is whole and consistent: the key is private and belongs to the certificate, the
certificate is in force and chains to the trust bundle. All problems are told at once, each with its
file and what to do. Files may be replaced while the node runs (:meth:`Identity.reload`); until the new
ones are as good, the old ones stay in force. Loading and checking are one module, as the checks of each
file need the others.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from hypha.errors import IdentityError, Problem
from hypha.pki.certificates import (
    TrustRules,
    common_name_of,
    crl_signed_by,
    ed25519_key_of,
    is_ca,
    is_self_signed,
    issued_by,
    parse_der,
    parse_pem,
    peer_id_of_key,
    roles_in,
    validity_problem,
)
from hypha.pki.contexts import make_context

logger = logging.getLogger(__name__)

#: What a certificate that a peer has made may have in it, as the library says it.
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
#: Intermediates learnt from peers' handshakes, so that a live connection can be checked again later.
_MAX_LEARNT = 64


@dataclass(frozen=True)
class IdentityFiles:
    """Where a node's identity lies. ``cert`` may hold a chain (own certificate first), ``trust`` any
    number of CAs, ``crls`` any number of revocation lists; all PEM.
    """

    cert: Path
    key: Path
    trust: Path
    crls: Path | None = None


@dataclass(frozen=True)
class Vouched:
    """What an accepted certificate says of its peer, and its authorities vouch for. ``name`` is its common
    name, empty where it has none.
    """

    peer_id: str
    name: str
    roles: frozenset[str]
    organization: str


@dataclass(frozen=True)
class _Material:
    """One consistent reading of the files."""

    chain: tuple[x509.Certificate, ...]
    key: Ed25519PrivateKey
    rules: TrustRules
    peer_id: str
    roles: frozenset[str]
    organization: str
    contexts: dict[tuple[bool, tuple[str, ...]], ssl.SSLContext] = field(default_factory=dict)


class Identity:
    """A node's checked identity. Made by :func:`load_identity`; safe to use from several threads."""

    def __init__(self, files: IdentityFiles, stamps: tuple[object, ...], material: _Material) -> None:
        self.files = files
        self._material = material
        self._stamps = stamps
        self._learnt: dict[bytes, x509.Certificate] = {}

    @property
    def peer_id(self) -> str:
        """libp2p PeerID (base58) of the certificate's key; the same for the life of this object."""
        return self._material.peer_id

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the certificate; empty means any."""
        return self._material.roles

    @property
    def organization(self) -> str:
        """The organisation that vouches for this node, as others see it; empty where it has no name."""
        return self._material.organization

    @property
    def certificates(self) -> tuple[bytes, ...]:
        """The own certificate and the CAs that go with it in handshakes, DER."""
        return tuple(one.public_bytes(Encoding.DER) for one in self._material.chain)

    @property
    def name(self) -> str:
        """The common name in the certificate; empty where it has none."""
        return common_name_of(self._material.chain[0])

    @property
    def private_key(self) -> Ed25519PrivateKey:
        return self._material.key

    def expirations(self) -> dict[str, datetime]:
        """When (UTC) the own ``certificate`` ends, the first of the CAs above it (``issuer``), and the first
        revocation list (``crl``), as far as there are such.
        """
        material = self._material
        own, *above = material.chain
        top = material.chain[-1].issuer
        above += [anchor for anchor in material.rules.anchors if anchor.subject == top]
        found = {"certificate": own.not_valid_after_utc}
        if above:
            found["issuer"] = min(ca.not_valid_after_utc for ca in above)
        if lists := [crl.next_update_utc for crl in material.rules.crls if crl.next_update_utc is not None]:
            found["crl"] = min(lists)
        return found

    def server_context(self, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
        """For accepting: TLS 1.3 only, the client's certificate required. Ask again for each
        connection (it is cached), so that reloaded files count at once; do not change it.
        """
        return self._context(True, alpn)

    def client_context(self, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
        """For dialling; as :meth:`server_context`. No host name is checked: the PeerID is the name."""
        return self._context(False, alpn)

    def _context(self, server: bool, alpn: tuple[str, ...]) -> ssl.SSLContext:
        material = self._material
        context = material.contexts.get((server, alpn))
        if context is None:
            context = make_context(
                material.chain, material.key, material.rules.anchors, server=server, alpn=alpn
            )
            material.contexts[server, alpn] = context
        return context

    def check(self, certificate_der: bytes, chain: Iterable[bytes] = ()) -> Vouched:
        """What a peer's certificate says, if it is trusted, in force and not revoked *now*; else
        IdentityError.

        To be called after every handshake, with ``presented_chain(tls)``, and again for live
        connections after a reload, when the chain may be left out: intermediates are remembered.
        """
        try:
            return self._check(certificate_der, chain)
        except _UNREADABLE as exc:
            raise IdentityError(f"the certificate cannot be read: {exc}") from exc

    def _check(self, certificate_der: bytes, chain: Iterable[bytes]) -> Vouched:
        leaf = parse_der(certificate_der)
        presented = [one for one in map(parse_der, list(chain)[:16]) if one != leaf]
        key = ed25519_key_of(leaf)
        rules = self._material.rules
        path = rules.check(leaf, (*presented, *list(self._learnt.values())))
        for ca in path[1:]:
            # only CAs of a path that ended at an anchor are remembered, so strangers cannot fill this
            if len(self._learnt) < _MAX_LEARNT:
                self._learnt.setdefault(ca.public_bytes(Encoding.DER), ca)
        name, roles = common_name_of(leaf), roles_in(leaf)
        return Vouched(peer_id_of_key(key), name, roles, rules.organization(path))

    def reload(self) -> bool:
        """Read the files again if any of them changed; True if they did and are now in force.

        Raises IdentityError when they cannot be used: what was in force stays so, and files that stay
        as broken as they are do not raise again. A certificate with another key is refused, because it is
        another PeerID.
        """
        stamps = _stamps(self.files)
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        material = _load(self.files, bool(self._material.rules.crls))
        if material.peer_id != self.peer_id:
            text = (
                f"the new certificate has another key (PeerID {material.peer_id} instead of {self.peer_id}); "
                "restart to change identity, or renew it with that key"
            )
            raise IdentityError([Problem("cert_pem", text, str(self.files.cert))])
        self._material = material
        return True


def load_identity(files: IdentityFiles, *, warn: bool = True) -> Identity:
    """Load and check a node's files; IdentityError holds every problem found. What is no problem, such as a
    revocation list that is out of date, is logged, unless ``warn`` is false: a program that loads them once
    more later, when its logging is set up, leaves it to that.
    """
    # taken before: what changes meanwhile is read again
    stamps = _stamps(files)
    return Identity(files, stamps, _load(files, warn=warn))


def _stamps(files: IdentityFiles) -> tuple[object, ...]:
    """What changes when a file is replaced, edited or its mode corrected."""
    stamps: list[object] = []
    for path in (files.cert, files.key, files.trust, files.crls):
        try:
            info = path.stat() if path is not None else None
        except OSError:
            info = None
        stamps.append(info and (info.st_mtime_ns, info.st_ctime_ns, info.st_size, info.st_ino, info.st_mode))
    return tuple(stamps)


class _Reader:
    """Reads the four files and collects what is wrong with them; each is known by its key in the
    configuration.
    """

    def __init__(self, files: IdentityFiles, warn: bool) -> None:
        self.paths = {"cert_pem": files.cert, "key_pem": files.key, "trust_pem": files.trust}
        if files.crls is not None:
            self.paths["crls_pem"] = files.crls
        self.problems: list[Problem] = []
        self._warns = warn

    def complain(self, key: str, message: str) -> None:
        self.problems.append(Problem(key=key, source=str(self.paths[key]), message=message))

    def tell(self, level: int, message: str, *arguments: object) -> None:
        if self._warns:
            logger.log(level, message, *arguments)

    def read(self, key: str) -> bytes | None:
        path = self.paths[key]
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if key == "key_pem" and mode & 0o077:
                    text = "the private key can be read by others"
                    self.complain(key, f"{text} (mode {mode:04o}); run `chmod 600 {path}`")
                return file.read(1 << 22)
        except FileNotFoundError:
            self.complain(key, "there is no such file; make it with `hypha-certutil`, or correct the path")
        except OSError as exc:
            self.complain(key, f"it cannot be read ({exc.strerror}); check its owner and mode")
        return None

    def certificates(self, key: str) -> tuple[x509.Certificate, ...]:
        data = self.read(key)
        if data is None:
            return ()
        try:
            return tuple(parse_pem(data))
        except ValueError:
            self.complain(key, "it holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")
            return ()

    def private_key(self) -> Ed25519PrivateKey | None:
        data = self.read("key_pem")
        if data is None:
            return None
        try:
            loaded = load_pem_private_key(data, password=None)
        except TypeError:
            text = (
                "the key is encrypted and nobody is there to type a passphrase; write it in the clear, mode "
                f"0600 (`openssl pkey -in {self.paths['key_pem']} -out plain.pem`)"
            )
        except (ValueError, UnsupportedAlgorithm):
            text = "it holds no private key in PEM form (PKCS#8, -----BEGIN PRIVATE KEY-----)"
        else:
            if isinstance(loaded, Ed25519PrivateKey):
                return loaded
            text = "the key is not Ed25519; make one with `openssl genpkey -algorithm ed25519`"
        self.complain("key_pem", text)
        return None

    def crls(self, needed: bool) -> tuple[x509.CertificateRevocationList, ...]:
        key = "crls_pem"
        path = self.paths.get(key)
        if path is None:
            return ()
        if not needed and not path.exists():
            # the rule in a new network, so no warning; one that was there and has gone is another matter: who
            # was revoked would be back
            self.tell(
                logging.INFO,
                "There is no revocation list at %s yet, so nobody is revoked; it is read once it exists.",
                path,
            )
            return ()
        data = self.read(key)
        if data is None:
            return ()
        end = b"-----END X509 CRL-----"
        found = []
        try:
            for block in data.split(end)[:-1]:
                start = block.index(b"-----BEGIN X509 CRL-----")
                found.append(x509.load_pem_x509_crl(block[start:] + end + b"\n"))
        except ValueError as exc:
            self.complain(key, f"a revocation list in it cannot be read: {exc}")
        if not found:
            # an empty file could be a list lost on the way: say so rather than revoke nobody silently
            self.complain(key, "it holds no revocation list in PEM form (-----BEGIN X509 CRL-----)")
        return tuple(found)


def _load(files: IdentityFiles, had_lists: bool = False, warn: bool = True) -> _Material:
    reader = _Reader(files, warn)
    certificates = reader.certificates("cert_pem")
    key = reader.private_key()
    bundle = reader.certificates("trust_pem")
    crls = reader.crls(had_lists)
    anchors = tuple(certificate for certificate in bundle if is_ca(certificate))
    if bundle and not anchors:
        reader.complain("trust_pem", "none of its certificates is a CA; put the CAs to trust in it")
    rules = TrustRules(anchors, crls)
    if certificates:
        _check_own(reader, certificates, key, rules)
    _check_crls(reader, crls, (*anchors, *certificates[1:]))
    if reader.problems or key is None:
        raise IdentityError(reader.problems)
    return _Material(
        chain=_chain_to_present(certificates, anchors),
        key=key,
        rules=rules,
        peer_id=peer_id_of_key(key.public_key()),
        roles=roles_in(certificates[0]),
        organization=rules.organization(rules.check(certificates[0], certificates[1:])),
    )


def _check_own(
    reader: _Reader,
    certificates: tuple[x509.Certificate, ...],
    key: Ed25519PrivateKey | None,
    rules: TrustRules,
) -> None:
    leaf, paths = certificates[0], reader.paths
    try:
        public = ed25519_key_of(leaf)
        roles_in(leaf)
    except IdentityError as exc:
        reader.complain("cert_pem", str(exc.problems[0].message))
        return
    if key is not None and key.public_key() != public:
        text = f"the key does not belong to the certificate {paths['cert_pem']}; one of them is wrong"
        reader.complain("key_pem", text)
    if is_ca(leaf):
        reader.complain("cert_pem", "its first certificate is a CA; a node's own must come first")
        return
    try:
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        pass
    else:
        wanted = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        if ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in usages and not all(
            one in usages for one in wanted
        ):
            text = "its extended key usage must allow both serverAuth and clientAuth"
            reader.complain("cert_pem", text)
    if (problem := validity_problem(leaf, datetime.now(UTC))) is not None:
        reader.complain("cert_pem", problem)
    elif rules.anchors:
        try:
            rules.check(leaf, certificates[1:])
        except IdentityError as exc:
            text = f"{exc.problems[0].message} (trust bundle: {paths['trust_pem']})"
            reader.complain("cert_pem", text)


def _check_crls(
    reader: _Reader,
    crls: tuple[x509.CertificateRevocationList, ...],
    authorities: tuple[x509.Certificate, ...],
) -> None:
    for crl in crls:
        issuer = crl.issuer.rfc4514_string()
        known = [ca for ca in authorities if ca.subject == crl.issuer]
        if known and not any(crl_signed_by(crl, ca) for ca in known):
            reader.complain("crls_pem", f"the revocation list of {issuer} was not signed by that CA's key")
        elif crl.next_update_utc is not None and crl.next_update_utc < datetime.now(UTC):
            reader.tell(
                logging.WARNING,
                "The revocation list of %s in %s is out of date since %s; it still counts, fetch a new one.",
                issuer,
                reader.paths["crls_pem"],
                f"{crl.next_update_utc:%Y-%m-%d}",
            )


def _chain_to_present(
    certificates: tuple[x509.Certificate, ...], anchors: tuple[x509.Certificate, ...]
) -> tuple[x509.Certificate, ...]:
    """The leaf and the CAs above it, without the root: a peer of another organisation trusts only the
    root, so our organisation's CA must come with the handshake even when the file holds just the leaf.
    """
    chain = [certificates[0]]
    candidates = [ca for ca in (*certificates[1:], *anchors) if is_ca(ca) and not is_self_signed(ca)]
    while (
        above := next((ca for ca in candidates if ca not in chain and issued_by(chain[-1], ca)), None)
    ) is not None:
        chain.append(above)
    return tuple(chain)

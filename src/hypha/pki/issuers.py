"""An authority on disk: its certificate, its key and what is above it, checked before it may sign; and how
key material is written: never readable by others for a moment, never over something, never half.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hypha.errors import IdentityError
from hypha.files.staging import StagedFile
from hypha.pki.certificates import is_ca, is_self_signed, issued_by, name_of, parse_pem, validity_problem

SigningKey = Ed25519PrivateKey | ed448.Ed448PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class CaFiles:
    """An authority on disk. ``trust`` holds what is above it; by default the ``-trust.pem`` beside it."""

    cert: Path
    key: Path
    trust: Path | None = None


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: SigningKey
    #: itself and what is above it
    bundle: tuple[x509.Certificate, ...]


def load_authority(ca: CaFiles, above: bool = True) -> Authority:
    """An authority that may issue: a CA, in force, with its own key. Without ``above`` what is above it does
    not matter, and need not be there.
    """
    certificate = load_certificate(ca.cert)
    if not is_ca(certificate):
        raise IdentityError(f"{ca.cert}: {name_of(certificate)} is no CA and cannot issue certificates")
    if (problem := validity_problem(certificate, datetime.now(UTC))) is not None:
        raise IdentityError(f"{ca.cert}: {problem}")
    try:
        key = load_pem_private_key(ca.key.read_bytes(), password=None)
    except OSError as exc:
        raise IdentityError(f"{ca.key}: it cannot be read ({exc.strerror})") from exc
    except TypeError as exc:
        raise IdentityError(f"{ca.key}: the key is encrypted; decrypt it first (`openssl pkey`)") from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise IdentityError(f"{ca.key}: it holds no private key in PEM form") from exc
    if not isinstance(key, SigningKey):
        raise IdentityError(f"{ca.key}: this kind of key cannot sign certificates")
    if key.public_key() != certificate.public_key():
        raise IdentityError(f"{ca.key}: the key does not belong to the CA certificate {ca.cert}")
    higher = _above(ca, certificate) if above or ca.trust is not None else ()
    return Authority(certificate, key, (certificate, *higher))


def _above(ca: CaFiles, certificate: x509.Certificate) -> tuple[x509.Certificate, ...]:
    """The CAs above ``certificate``, from its trust file; they must lead upwards from it."""
    if is_self_signed(certificate):
        return ()
    trust = ca.trust
    if trust is None:
        trust = ca.cert.with_name(ca.cert.name.removesuffix("-cert.pem") + "-trust.pem")
        if not trust.exists():
            raise IdentityError(
                f"{trust}: there is no such file; it must hold the root above {ca.cert}, so that nodes can "
                "trust other organisations under it (name it with the trust option)"
            )
    bundle = load_chain(trust)
    chain = [certificate]
    while (
        above := next((one for one in bundle if one not in chain and issued_by(chain[-1], one)), None)
    ) is not None:
        chain.append(above)
    if len(chain) == 1:
        raise IdentityError(f"{trust}: it does not hold the issuer of {ca.cert}")
    return tuple(chain[1:])


def load_certificate(path: Path) -> x509.Certificate:
    return load_chain(path)[0]


def load_chain(path: Path) -> list[x509.Certificate]:
    """All certificates in ``path``, one at least. Raises IdentityError."""
    try:
        return parse_pem(path.read_bytes())
    except OSError as exc:
        raise IdentityError(f"{path}: it cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise IdentityError(f"{path}: it holds no certificate in PEM form") from exc


def sign(builder: x509.CertificateBuilder, key: SigningKey) -> x509.Certificate:
    return builder.sign(key, digest_for(key))


def digest_for(key: SigningKey) -> hashes.SHA256 | None:
    return None if isinstance(key, Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()


def key_identifier_of(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())  # type: ignore[arg-type]


def write_new(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """Write ``(path, content, mode)`` each under its final name, or none of them."""
    made: list[Path] = []
    try:
        for path, content, mode in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            _place(path, content, mode)
            made.append(path)
    except OSError as exc:
        for path in made:
            path.unlink(missing_ok=True)
        what = (
            "already there" if isinstance(exc, FileExistsError) else f"it cannot be written ({exc.strerror})"
        )
        raise IdentityError(f"{exc.filename2 or exc.filename or files[0][0]}: {what}") from exc


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Atomically replace ``path``, whose owner and mode stay as they are, or make it with ``mode``."""
    try:
        try:
            before = path.stat()
        except FileNotFoundError:
            before = None
        _place(path, content, mode if before is None else stat.S_IMODE(before.st_mode), before)
    except OSError as exc:
        raise IdentityError(f"{path}: it cannot be written ({exc.strerror})") from exc


def _place(path: Path, content: bytes, mode: int, over: os.stat_result | None = None) -> None:
    """``over`` is the file that is replaced; without one nothing may be there."""
    with StagedFile(path, durable=True, mode=mode, exclusive=over is None) as staged:
        staged.file.write(content)
        if over is not None and (over.st_uid, over.st_gid) != (os.geteuid(), os.getegid()):
            # a node that runs as somebody else has to read it again; raises where we may not
            os.fchown(staged.file.fileno(), over.st_uid, over.st_gid)
        staged.publish()

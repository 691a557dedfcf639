"""TLS contexts of both planes: version 1.3 only, both sides show certificates, no session resumption."""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def make_context(
    chain: Sequence[x509.Certificate],
    key: Ed25519PrivateKey,
    anchors: Sequence[x509.Certificate],
    *,
    server: bool,
    alpn: tuple[str, ...],
) -> ssl.SSLContext:
    """A context that presents ``chain`` (own certificate first) and trusts what ``anchors`` issued."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # strict flags would refuse what plain `openssl x509 -req` makes (no key identifiers, version 1)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if server:
        # without tickets there is no resumption, which would skip looking at the certificate again
        context.num_tickets = 0
        context.sni_callback = _note_server_name
    if alpn:
        context.set_alpn_protocols(list(alpn))
    context.load_verify_locations(cadata=b"".join(anchor.public_bytes(Encoding.DER) for anchor in anchors))
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain_pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    with _readable(chain_pem) as certificate_path, _readable(key_pem) as key_path:
        context.load_cert_chain(certificate_path, key_path)
    return context


def _note_server_name(tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
    # what is dialled are keys and not names, so the name says something else: see asked_name_of
    vars(tls)["hypha_asked_name"] = name


def asked_name_of(tls: ssl.SSLObject) -> str | None:
    """The name that whoever dialled has sent in the clear (SNI), if any."""
    name = vars(tls).get("hypha_asked_name")
    return name if isinstance(name, str) else None


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    """A path under which ``data`` can be read: OpenSSL takes keys by path only, and what is loaded must
    be what was checked, not what lies in the file a moment later. In memory where the system can.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("hypha-identity", os.MFD_CLOEXEC)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
        return
    with tempfile.NamedTemporaryFile() as file:  # mode 0600
        file.write(data)
        file.flush()
        yield file.name

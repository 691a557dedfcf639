"""Loading identities: what is refused and how it is said, and who trusts whom in real handshakes."""

from __future__ import annotations

import logging
import os
import shutil
import ssl
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from hypha.errors import IdentityError
from hypha.pki.authority import CaFiles, MadeFiles, make_node, make_org, make_root, renew_node, revoke
from hypha.pki.certificates import ed25519_key_of, parse_der, peer_id_of_key, presented_chain, roles_in
from hypha.pki.identity import Identity, IdentityFiles, load_identity


class World:
    """A root with two organisations."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        made = make_root("Root", directory)
        self.root = CaFiles(made.cert, made.key)
        self.orgs = [self.org("Alpha"), self.org("Beta")]

    def org(self, name: str) -> CaFiles:
        made = make_org(name, self.root, self.directory)
        return CaFiles(made.cert, made.key)

    def node(self, name: str, org: int = 0, roles: tuple[str, ...] = ()) -> IdentityFiles:
        return files_of(make_node(name, self.orgs[org], self.directory, roles=roles))


def files_of(made: MadeFiles) -> IdentityFiles:
    assert made.trust is not None
    return IdentityFiles(made.cert, made.key, made.trust)


def handshake(client: Identity, server: Identity) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A whole TLS handshake in memory, checks of both sides included."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.client_context().wrap_bio(to_client, to_server)
    far = server.server_context().wrap_bio(to_server, to_client, server_side=True)
    waiting = [near, far]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    for identity, side in ((client, near), (server, far)):
        der = side.getpeercert(binary_form=True)
        assert der is not None
        identity.check(der, presented_chain(side))
    return near, far


def problems_of(files: IdentityFiles) -> list[str]:
    with pytest.raises(IdentityError) as caught:
        load_identity(files)
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_peer_id_is_the_one_libp2p_computes() -> None:
    # pinned: a key made of 32 zero bytes, through libp2p's PeerId::from_public_key
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    assert peer_id_of_key(key) == "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def test_a_made_identity_loads(world: World) -> None:
    files = world.node("n", roles=("worker", "data"))
    identity = load_identity(files)
    der = x509.load_pem_x509_certificate(files.cert.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert identity.peer_id == peer_id_of_key(ed25519_key_of(parse_der(der)))
    assert identity.roles == roles_in(parse_der(der)) == {"worker", "data"}
    assert identity.expirations()["certificate"] > datetime.now(UTC) + timedelta(days=360)


def test_two_organisations_under_one_root_trust_each_other(world: World) -> None:
    handshake(load_identity(world.node("a")), load_identity(world.node("b", org=1)))


def test_a_bundle_with_only_one_organisation_trusts_only_that(world: World) -> None:
    narrow = replace(world.node("a"), trust=world.orgs[0].cert)
    handshake(load_identity(narrow), load_identity(world.node("same")))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(load_identity(narrow), load_identity(world.node("b", org=1)))


def test_a_chain_in_the_certificate_file_is_presented(world: World) -> None:
    files = world.node("a")
    both = world.directory / "both.pem"
    both.write_bytes(files.cert.read_bytes() + world.orgs[0].cert.read_bytes())
    chained = IdentityFiles(both, files.key, world.root.cert)
    handshake(load_identity(chained), load_identity(world.node("b", org=1)))


def test_strangers_do_not_shake_hands(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(load_identity(world.node("a")), load_identity(other.node("b")))


def test_contexts_speak_tls_1_3_and_resume_nothing(world: World) -> None:
    identity = load_identity(world.node("a"))
    near, _ = handshake(identity, load_identity(world.node("b")))
    assert near.version() == "TLSv1.3"
    server = identity.server_context()
    assert server.num_tickets == 0
    assert identity.server_context() is server
    for context in (server, identity.client_context()):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED


def test_several_problems_are_told_at_once(world: World) -> None:
    files = world.node("a")
    files.key.chmod(0o644)
    files.trust.write_text("garbage")
    crl = world.directory / "crl.pem"
    crl.write_text("garbage")
    told = problems_of(replace(files, crls=crl))
    assert len(told) == 3
    assert f"{files.key}: key_pem" in told[0]
    assert f"chmod 600 {files.key}" in told[0]
    assert f"{files.trust}: trust_pem" in told[1]
    assert "crl.pem: crls_pem: it holds no revocation list" in told[2]


@pytest.mark.parametrize("which", ["cert", "key", "trust"])
def test_missing_and_garbage_files_are_named(world: World, which: str) -> None:
    files = world.node("a")
    path: Path = getattr(files, which)
    path.write_bytes(b"\x00\xff garbage")
    path.chmod(0o600)
    assert any(str(path) in told and "PEM" in told for told in problems_of(files))
    path.unlink()
    assert any(str(path) in told and "no such file" in told for told in problems_of(files))
    path.mkdir()
    assert any(str(path) in told and "cannot be read" in told for told in problems_of(files))


def test_a_key_of_another_certificate_is_refused(world: World) -> None:
    (told,) = problems_of(replace(world.node("a"), key=world.node("b").key))
    assert "does not belong to the certificate" in told


def test_a_key_with_a_passphrase_is_refused(world: World) -> None:
    files = world.node("a")
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (told,) = problems_of(files)
    assert "encrypted" in told


def reissued(world: World, files: IdentityFiles, start_days: int, end_days: int) -> None:
    """The same certificate with other dates, signed by its CA."""
    old = x509.load_pem_x509_certificate(files.cert.read_bytes())
    ca = serialization.load_pem_private_key(world.orgs[0].key.read_bytes(), None)
    assert isinstance(ca, ed25519.Ed25519PrivateKey)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=start_days))
        .not_valid_after(now + timedelta(days=end_days))
    )
    files.cert.write_bytes(builder.sign(ca, None).public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(("start", "end", "word"), [(-9, -1, "expired on"), (1, 9, "not valid before")])
def test_certificates_out_of_their_time_are_refused(world: World, start: int, end: int, word: str) -> None:
    files = world.node("a")
    reissued(world, files, start, end)
    (told,) = problems_of(files)
    assert word in told
    assert str(files.cert) in told


def test_a_certificate_that_expires_while_connected_fails_its_next_check(world: World) -> None:
    files = world.node("a")
    der = der_of(files)
    checker = load_identity(world.node("b"))
    checker.check(der)
    reissued(world, files, -9, -1)
    with pytest.raises(IdentityError, match="expired"):
        checker.check(der_of(files))


def test_a_certificate_outside_the_trust_bundle_is_refused(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other")
    (told,) = problems_of(replace(world.node("a"), trust=other.root.cert))
    assert "does not chain" in told
    assert str(other.root.cert) in told


def test_a_trust_bundle_without_a_ca_is_refused(world: World) -> None:
    files = world.node("a")
    (told,) = problems_of(replace(files, trust=files.cert))
    assert "none of its certificates is a CA" in told


def test_a_ca_is_no_node(world: World) -> None:
    ca = world.orgs[0]
    (told,) = problems_of(IdentityFiles(ca.cert, ca.key, world.root.cert))
    assert "is a CA" in told


def test_a_node_cannot_issue_certificates(world: World) -> None:
    """A leaf that signs another leaf makes a path that must not be trusted, and OpenSSL agrees."""
    parent = world.node("parent")
    parent_certificate = x509.load_pem_x509_certificate(parent.cert.read_bytes())
    parent_key = serialization.load_pem_private_key(parent.key.read_bytes(), None)
    assert isinstance(parent_key, ed25519.Ed25519PrivateKey)
    now = datetime.now(UTC)
    forged = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "forged")]))
        .issuer_name(parent_certificate.subject)
        .public_key(ed25519.Ed25519PrivateKey.generate().public_key())
        .serial_number(5)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(parent_key, None)
    )
    checker = load_identity(world.node("b"))
    with pytest.raises(IdentityError, match="does not chain"):
        checker.check(forged.public_bytes(serialization.Encoding.DER), [der_of(parent)])


def der_of(files: IdentityFiles) -> bytes:
    certificate = x509.load_pem_x509_certificate(files.cert.read_bytes())
    return certificate.public_bytes(serialization.Encoding.DER)


def test_revocation_is_seen_after_a_reload(world: World) -> None:
    bad, good = world.node("bad", org=1), world.node("good", org=1)
    crl = world.directory / "crls.pem"
    revoke(world.orgs[0], [], crl)
    identity = load_identity(replace(world.node("me"), crls=crl))
    bad_der = der_of(bad)
    # the other organisation's CA comes with the handshake and is remembered for later checks
    handshake(identity, load_identity(bad))
    assert identity.reload() is False
    theirs = world.directory / "theirs.pem"
    revoke(world.orgs[1], [bad.cert], theirs)
    crl.write_bytes(crl.read_bytes() + theirs.read_bytes())
    assert identity.reload() is True
    with pytest.raises(IdentityError, match="revoked"):
        identity.check(bad_der)
    with pytest.raises(IdentityError, match="revoked"):
        handshake(identity, load_identity(bad))
    # no list of the root is there, which must not lock anybody out
    handshake(identity, load_identity(good))
    handshake(load_identity(good), identity)


def test_a_list_that_does_not_exist_yet_revokes_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    bad = world.node("bad")
    crl = world.directory / "later.pem"
    with caplog.at_level(logging.INFO):
        identity = load_identity(replace(world.node("me"), crls=crl))
    (told,) = [record for record in caplog.records if "no revocation list at" in record.getMessage()]
    assert told.levelno == logging.INFO, "every program says so in a new network"
    identity.check(der_of(bad))
    revoke(world.orgs[0], [bad.cert], crl)
    assert identity.reload() is True
    with pytest.raises(IdentityError, match="revoked"):
        identity.check(der_of(bad))
    # once it was there it must not vanish: who was revoked would be back
    crl.unlink()
    with pytest.raises(IdentityError, match="there is no such file"):
        identity.reload()
    with pytest.raises(IdentityError, match="revoked"):
        identity.check(der_of(bad))


def test_a_revoked_organisation_takes_its_nodes_along(world: World) -> None:
    crl = world.directory / "crls.pem"
    revoke(world.root, [world.orgs[1].cert], crl)
    identity = load_identity(replace(world.node("me"), crls=crl))
    with pytest.raises(IdentityError, match="revoked"):
        handshake(identity, load_identity(world.node("b", org=1)))
    # not even when that organisation's CA is itself in the bundle
    wide = world.directory / "wide.pem"
    wide.write_bytes(world.root.cert.read_bytes() + b"".join(org.cert.read_bytes() for org in world.orgs))
    identity = load_identity(replace(world.node("me2"), crls=crl, trust=wide))
    with pytest.raises(IdentityError, match="revoked"):
        identity.check(der_of(world.node("c", org=1)))


def test_ones_own_revocation_is_told_at_start(world: World) -> None:
    files = world.node("a")
    crl = world.directory / "crl.pem"
    revoke(world.orgs[0], [files.cert], crl)
    (told,) = problems_of(replace(files, crls=crl))
    assert "revoked" in told


def test_a_list_signed_by_another_key_is_refused(world: World, tmp_path: Path) -> None:
    twin = World(tmp_path / "twin")  # the same names, other keys
    crl = tmp_path / "crl.pem"
    revoke(twin.orgs[0], [], crl)
    (told,) = problems_of(replace(world.node("a"), crls=crl))
    assert "not signed by that CA's key" in told
    # for a CA that is not known yet it is kept, and must be signed by the one that then comes along
    twin_beta = tmp_path / "beta.pem"
    revoke(twin.orgs[1], [], twin_beta)
    identity = load_identity(replace(world.node("b"), crls=twin_beta))
    handshake(identity, load_identity(world.node("c", org=1)))


def test_an_old_list_still_revokes_and_warns(world: World, caplog: pytest.LogCaptureFixture) -> None:
    bad = world.node("bad")
    crl = world.directory / "crl.pem"
    key = serialization.load_pem_private_key(world.orgs[0].key.read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    ca = x509.load_pem_x509_certificate(world.orgs[0].cert.read_bytes())
    then = datetime.now(UTC) - timedelta(days=9)
    revoked = (
        x509.RevokedCertificateBuilder()
        .serial_number(x509.load_pem_x509_certificate(bad.cert.read_bytes()).serial_number)
        .revocation_date(then)
        .build()
    )
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject).add_revoked_certificate(revoked)
    signed = builder.last_update(then).next_update(then + timedelta(days=1)).sign(key, None)
    crl.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    identity = load_identity(replace(world.node("me"), crls=crl))
    assert "out of date" in caplog.text
    with pytest.raises(IdentityError, match="revoked"):
        identity.check(der_of(bad))


def test_an_empty_revocation_file_is_refused(world: World) -> None:
    crl = world.directory / "crl.pem"
    crl.write_bytes(b"")
    (told,) = problems_of(replace(world.node("a"), crls=crl))
    assert "holds no revocation list" in told


def test_a_renewed_certificate_comes_into_force_without_a_restart(world: World) -> None:
    files = world.node("a")
    identity = load_identity(files)
    before, context = identity.peer_id, identity.server_context()
    renew_node(files.cert, world.orgs[0], days=900)
    assert identity.reload() is True
    assert identity.reload() is False
    assert identity.peer_id == before
    assert identity.expirations()["certificate"] > datetime.now(UTC) + timedelta(days=800)
    assert identity.server_context() is not context


def test_a_broken_new_file_leaves_the_old_identity_in_force(world: World) -> None:
    files = world.node("a")
    identity = load_identity(files)
    good = files.cert.read_bytes()
    files.cert.write_bytes(b"half a certif")
    with pytest.raises(IdentityError, match="PEM"):
        identity.reload()
    assert identity.reload() is False  # told once, not every time somebody looks
    handshake(identity, load_identity(world.node("b")))
    files.cert.write_bytes(good)
    assert identity.reload() is True


def test_another_key_needs_a_restart(world: World) -> None:
    files, other = world.node("a"), world.node("b")
    identity = load_identity(files)
    before = identity.peer_id
    os.replace(other.cert, files.cert)
    os.replace(other.key, files.key)
    with pytest.raises(IdentityError, match="restart"):
        identity.reload()
    assert identity.peer_id == before


def test_peers_that_send_nonsense_get_an_identity_error(world: World) -> None:
    identity = load_identity(world.node("a"))
    for nonsense in (b"", b"nonsense", b"\x30\x82\xff\xff"):
        with pytest.raises(IdentityError):
            identity.check(nonsense)
        with pytest.raises(IdentityError):
            peer_id_of_key(ed25519_key_of(parse_der(nonsense)))
        with pytest.raises(IdentityError):
            identity.check(der_of(world.node(f"b{len(nonsense)}")), [nonsense])


openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")


def run_openssl(directory: Path, *commands: str) -> None:
    for command in commands:
        subprocess.run(["openssl", *command.split()], cwd=directory, check=True, capture_output=True)


@openssl
@pytest.mark.parametrize("version", ["v3", "v1"])
def test_certificates_of_plain_openssl_work(tmp_path: Path, version: str) -> None:
    """The commands people know, without any extension file for the node, and an RSA root."""
    run_openssl(
        tmp_path, "req -x509 -newkey rsa:2048 -nodes -keyout root.key -out root.pem -subj /CN=R -days 9"
    )
    (tmp_path / "ca.ext").write_text("basicConstraints=critical,CA:TRUE\n")
    (tmp_path / "v3.ext").write_text("basicConstraints=CA:FALSE\n")
    run_openssl(
        tmp_path,
        "genpkey -algorithm ed25519 -out ca.key",
        "req -new -key ca.key -subj /CN=Org -out ca.csr",
        "x509 -req -in ca.csr -CA root.pem -CAkey root.key -CAcreateserial -extfile ca.ext -out ca.pem",
    )
    found = []
    for name in ("one", "two"):
        extensions = "-extfile v3.ext" if version == "v3" else ""
        run_openssl(
            tmp_path,
            f"genpkey -algorithm ed25519 -out {name}.key",
            f"req -new -key {name}.key -subj /CN={name} -out {name}.csr",
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 9 {extensions} "
            f"-out {name}.pem",
        )
        (tmp_path / f"{name}.key").chmod(0o600)
        (tmp_path / "trust.pem").write_bytes(
            (tmp_path / "ca.pem").read_bytes() + (tmp_path / "root.pem").read_bytes()
        )
        files = IdentityFiles(tmp_path / f"{name}.pem", tmp_path / f"{name}.key", tmp_path / "trust.pem")
        found.append(load_identity(files))
    handshake(*found)
    # and our own tool can go on where openssl left off
    made = make_node(
        "three", CaFiles(tmp_path / "ca.pem", tmp_path / "ca.key", tmp_path / "trust.pem"), tmp_path
    )
    handshake(load_identity(files_of(made)), found[0])


@openssl
def test_an_rsa_node_certificate_is_refused(world: World) -> None:
    made, ca = world.directory, world.orgs[0]
    run_openssl(
        made,
        "req -newkey rsa:2048 -nodes -keyout rsa.key -out rsa.csr -subj /CN=rsa",
        f"x509 -req -in rsa.csr -CA {ca.cert} -CAkey {ca.key} -CAcreateserial -out rsa.pem",
    )
    (made / "rsa.key").chmod(0o600)
    told = problems_of(IdentityFiles(made / "rsa.pem", made / "rsa.key", world.root.cert))
    assert all("Ed25519" in line for line in told)
    assert len(told) == 2


def test_a_name_that_cannot_be_read_is_found_where_the_file_is_read(tmp_path: Path) -> None:
    """The library reads names when they are asked for: such a one came out of the search for a path."""
    root = make_root("Root", tmp_path)
    organisation = make_org("Organisation", CaFiles(root.cert, root.key), tmp_path)
    made = make_node("node", CaFiles(organisation.cert, organisation.key, organisation.trust), tmp_path)
    encoding = serialization.Encoding.DER
    der = x509.load_pem_x509_certificates(made.trust.read_bytes())[0].public_bytes(encoding)
    spoilt = der.replace(b"Root", b"\xffoot", 1)
    with pytest.raises(IdentityError, match="is no X"):
        parse_der(spoilt)
    text = ssl.DER_cert_to_PEM_cert(spoilt)
    made.trust.write_text(text)
    with pytest.raises(IdentityError):
        load_identity(IdentityFiles(made.cert, made.key, made.trust))

"""Roles and organisations: what a certificate says, what its authorities vouch for, and what neither may."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from hypha.errors import IdentityError
from hypha.pki import authority
from hypha.pki.authority import CaFiles, MadeFiles, make_node, make_org, make_root, renew_node
from hypha.pki.certificates import ROLE_PREFIX, roles_in
from hypha.pki.identity import Identity, IdentityFiles, Vouched, load_identity
from hypha.pki.inspection import inspected, names_in
from hypha.pki.issuers import load_certificate


@pytest.fixture
def root(tmp_path: Path) -> CaFiles:
    made = make_root("Root", tmp_path)
    return CaFiles(made.cert, made.key)


def org(root: CaFiles, name: str, *roles: str) -> CaFiles:
    made = make_org(name, root, root.cert.parent, roles=roles)
    return CaFiles(made.cert, made.key, made.trust)


def files_of(made: MadeFiles) -> IdentityFiles:
    assert made.trust is not None
    return IdentityFiles(made.cert, made.key, made.trust)


@pytest.fixture
def judge(root: CaFiles) -> Identity:
    """Somebody of one organisation who trusts the root."""
    return load_identity(files_of(make_node("judge", org(root, "Own"), root.cert.parent, roles=["gateway"])))


def der(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


def checked(judge: Identity, node: MadeFiles, ca: CaFiles) -> Vouched:
    return judge.check(der(node.cert), [der(ca.cert)])


def issue(
    subject: x509.Name,
    key: Ed25519PrivateKey,
    ca: x509.Certificate,
    ca_key: Ed25519PrivateKey,
    *more: x509.ExtensionType,
) -> x509.Certificate:
    """What an authority with a program of its own may sign."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    for extension in more:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(ca_key, None)


def loaded(ca: CaFiles) -> tuple[x509.Certificate, Ed25519PrivateKey]:
    key = load_pem_private_key(ca.key.read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return x509.load_pem_x509_certificate(ca.cert.read_bytes()), key


def named(common_name: str, organization: str = "") -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            *([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)] if organization else []),
        ]
    )


def uris(*texts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text) for text in texts])


# --- roles as they are written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        (f"{ROLE_PREFIX}Worker", "Worker"),
        (f"{ROLE_PREFIX}worker-2", "worker-2"),
        (f"{ROLE_PREFIX}", ""),
        (f"{ROLE_PREFIX}worker ", "worker "),
        ("URN:hypha:role:worker", "URN:hypha:role:worker"),
        ("urn:Hypha:Role:worker", "urn:Hypha:Role:worker"),
    ],
)
def test_what_resembles_a_role_is_another_one_and_never_none(root: CaFiles, name: str, role: str) -> None:
    """A certificate without a role could play every role."""
    ca, key = loaded(root)
    node = issue(named("n"), Ed25519PrivateKey.generate(), ca, key, uris(name))
    assert roles_in(node) == {role}


def test_roles_are_no_names(root: CaFiles, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="say them with the role option"):
        make_node("n", root, tmp_path / "n", roles=["worker"], san=["urn:hypha:role:scheduler"])


def test_a_certificate_gets_a_role_and_keeps_its_key(root: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", root, tmp_path / "n", san=["n.example.org"])
    before = inspected(load_certificate(node.cert))
    renew_node(node.cert, root, roles=["worker"])
    after = inspected(load_certificate(node.cert))
    assert (before.roles, after.roles) == (frozenset(), {"worker"})
    assert after.peer_id == before.peer_id
    assert "n.example.org" in names_in(after.certificate)
    renew_node(node.cert, root, roles=["data"])
    assert inspected(load_certificate(node.cert)).roles == {"data"}
    with pytest.raises(IdentityError, match="there is no role boss"):
        renew_node(node.cert, root, roles=["boss"])


# --- a CA is no node ----------------------------------------------------------------------------------


def test_a_ca_is_no_node(root: CaFiles, judge: Identity) -> None:
    """Whoever has an organisation's key could else be a node of any role, which no list revokes."""
    with pytest.raises(IdentityError, match="is one of a CA, which a node may not use"):
        judge.check(der(org(root, "Other").cert))
    ca, key = loaded(root)
    usage = x509.KeyUsage(True, False, False, False, False, True, False, False, False)
    for half in (x509.BasicConstraints(ca=True, path_length=None), usage):
        node = issue(named("n"), Ed25519PrivateKey.generate(), ca, key, half, uris("urn:hypha:role:worker"))
        with pytest.raises(IdentityError, match="is one of a CA"):
            judge.check(node.public_bytes(Encoding.DER))


@pytest.mark.parametrize("junk", [b"", b"\x30\x00", b"\xff" * 64])
def test_what_is_no_certificate_is_one_kind_of_error(judge: Identity, junk: bytes) -> None:
    with pytest.raises(IdentityError):
        judge.check(junk)
    with pytest.raises(IdentityError):
        judge.check(der(judge.files.cert), [junk])


# --- an organisation's CA may be limited ----------------------------------------------------------------


def test_a_limited_organisation_vouches_for_its_roles_only(
    root: CaFiles, judge: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = org(root, "Lab", "worker", "data")
    good = make_node("good", limited, tmp_path / "n", roles=["data"])
    assert checked(judge, good, limited).roles == {"data"}
    wanted: list[tuple[str, list[str]]] = [
        ("boss", ["scheduler"]),
        ("both", ["worker", "gateway"]),
        ("none", []),
    ]
    for name, roles in wanted:
        with pytest.raises(IdentityError, match="may only vouch for the role data and worker"):
            make_node(name, limited, tmp_path / "n", roles=roles)
    with pytest.raises(IdentityError, match="may only vouch for"):
        renew_node(good.cert, limited, roles=["gateway"])
    # it has the key, so it may use another program than ours
    monkeypatch.setattr(authority, "_check_limit", lambda *of: None)
    for name, roles in wanted:
        node = make_node(name, limited, tmp_path / "n", roles=roles)
        with pytest.raises(
            IdentityError, match=r"may only vouch for the role data and worker, and .* carries"
        ):
            checked(judge, node, limited)
        with pytest.raises(IdentityError, match="may only vouch for"):
            load_identity(files_of(node))


def test_a_limit_is_shown_and_no_problem_to_openssl(root: CaFiles, judge: Identity, tmp_path: Path) -> None:
    limited = org(root, "Lab", "data", "worker")
    assert inspected(load_certificate(limited.cert)).may_issue == {"data", "worker"}
    assert inspected(load_certificate(root.cert)).may_issue is None
    node = make_node("n", limited, tmp_path / "n", roles=["data"])
    ran = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", root.cert, "-untrusted", limited.cert, node.cert],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert checked(judge, node, limited).organization == "Lab"


# --- which organisation -------------------------------------------------------------------------------


def test_the_organisation_is_the_one_that_vouches(root: CaFiles, judge: Identity, tmp_path: Path) -> None:
    """An organisation may write another one's name into its nodes' certificates."""
    other = org(root, "Other")
    ca, key = loaded(other)
    own = Ed25519PrivateKey.generate()
    node = issue(named("n", "Own"), own, ca, key, uris("urn:hypha:role:data"))
    vouched = judge.check(node.public_bytes(Encoding.DER), [der(other.cert)])
    assert vouched.organization == "Other"
    assert judge.organization == "Own"
    honest = make_node("m", org(root, "Third"), tmp_path / "m", roles=["data"])
    assert load_identity(files_of(honest)).organization == "Third"


def test_what_a_peer_puts_above_a_trusted_ca_names_nobody(root: CaFiles, tmp_path: Path) -> None:
    """A CA of the peer's own making that has signed the root's key once more."""
    lab = org(root, "Lab")
    node = make_node("n", lab, tmp_path / "n", roles=["data"])
    alone = tmp_path / "alone.pem"
    alone.write_bytes(lab.cert.read_bytes())
    judge = load_identity(IdentityFiles(node.cert, node.key, alone))
    top, root_key = loaded(root)
    forger = Ed25519PrivateKey.generate()
    ca = x509.BasicConstraints(ca=True, path_length=None)
    forged = issue(named("Forged", "Victim"), forger, top, forger, ca)
    crossed = issue(top.subject, root_key, forged, forger, ca)
    presented = [one.public_bytes(Encoding.DER) for one in (crossed, forged)]
    assert judge.check(der(node.cert), [der(lab.cert), *presented]).organization == "Lab"


def test_without_an_organisation_the_ca_that_is_trusted_itself_counts(root: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", root, tmp_path / "n", roles=["data"])
    assert load_identity(files_of(node)).organization == "Root"

"""Certificates that are made: their files, their modes, and that nothing is ever clobbered."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from hypha.errors import IdentityError
from hypha.pki.authority import CaFiles, make_node, make_org, make_root, renew_node, revoke
from hypha.pki.certificates import is_self_signed
from hypha.pki.identity import IdentityFiles, load_identity
from hypha.pki.inspection import inspected, key_beside, key_problems, names_in
from hypha.pki.issuers import load_certificate, load_chain


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def org(tmp_path: Path) -> CaFiles:
    root = make_root("Acme", tmp_path / "root", country="DE")
    made = make_org("Acme Lab", CaFiles(root.cert, root.key), tmp_path / "org")
    return CaFiles(made.cert, made.key)


def test_files_carry_the_promised_names_and_modes(tmp_path: Path) -> None:
    root = make_root("Acme", tmp_path / "new" / "place", country="DE")
    org = make_org("Acme Lab", CaFiles(root.cert, root.key), tmp_path / "new" / "place")
    node = make_node("Worker One", CaFiles(org.cert, org.key), tmp_path / "nodes")
    assert names(tmp_path / "new" / "place") == {
        "acme-ca-cert.pem",
        "acme-ca-key.pem",
        "acme-lab-ca-cert.pem",
        "acme-lab-ca-key.pem",
        "acme-lab-ca-trust.pem",
    }
    assert names(tmp_path / "nodes") == {
        "worker-one-cert.pem",
        "worker-one-key.pem",
        "worker-one-trust.pem",
    }
    for made in (root, org, node):
        assert mode(made.key) == 0o600
        assert mode(made.cert) == 0o644
    assert node.trust is not None
    assert node.trust.read_bytes() == org.cert.read_bytes() + root.cert.read_bytes()


def test_certificates_are_readable_by_others_under_a_tight_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = make_root("Acme", tmp_path)
    finally:
        os.umask(before)
    assert mode(made.cert) == 0o644


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_openssl_accepts_the_chain_under_its_strict_rules(org: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", org, tmp_path, roles={"worker", "data"}, san=["node.example.org", "192.0.2.1"])
    root = tmp_path / "root" / "acme-ca-cert.pem"
    result = subprocess.run(
        [
            "openssl",
            "verify",
            "-x509_strict",
            "-CAfile",
            str(root),
            "-untrusted",
            str(org.cert),
            str(node.cert),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_subjects_inherit_country_and_organisation(org: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", org, tmp_path, roles={"worker"}, san=["node.example.org"])
    found = inspected(certificate := load_certificate(node.cert))
    assert certificate.subject.rfc4514_string() == "CN=n,O=Acme Lab,C=DE"
    assert certificate.issuer.rfc4514_string() == "CN=Acme Lab CA,O=Acme Lab,C=DE"
    assert found.roles == {"worker"}
    assert names_in(certificate) == ("urn:hypha:role:worker", "node.example.org")
    assert found.problems == ()
    assert found.peer_id is not None
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 366


def test_a_root_and_an_organisation_of_one_name_never_clobber_each_other(tmp_path: Path) -> None:
    root = make_root("Acme", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(IdentityError, match="another name"):
        make_org("Acme", CaFiles(root.cert, root.key), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    make_org("Acme", CaFiles(root.cert, root.key), tmp_path / "elsewhere")


def test_an_organisation_cannot_have_the_subject_of_its_root(tmp_path: Path) -> None:
    root = make_root("Acme", tmp_path, name="Acme CA")
    with pytest.raises(IdentityError, match="very name"):
        make_org("Acme", CaFiles(root.cert, root.key), tmp_path / "o", name="Acme CA")


@pytest.mark.parametrize("present", ["n-cert.pem", "n-key.pem", "n-trust.pem"])
def test_nothing_is_written_when_one_file_is_there(org: CaFiles, tmp_path: Path, present: str) -> None:
    place = tmp_path / "nodes"
    place.mkdir()
    (place / present).write_text("precious")
    with pytest.raises(IdentityError, match=present):
        make_node("n", org, place)
    assert names(place) == {present}
    assert (place / present).read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_named(org: CaFiles, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match="file"):
        make_node("n", org, tmp_path / "file" / "below")


def test_only_a_ca_in_force_with_its_own_key_issues(org: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", org, tmp_path / "a")
    with pytest.raises(IdentityError, match="no CA"):
        make_node("m", CaFiles(node.cert, node.key), tmp_path / "b")
    with pytest.raises(IdentityError, match="does not belong"):
        make_node("m", CaFiles(org.cert, node.key), tmp_path / "b")
    with pytest.raises(IdentityError, match="path length"):
        make_org("Below", org, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_missing_trust_file_beside_the_ca_is_named(org: CaFiles, tmp_path: Path) -> None:
    trust = org.cert.with_name("acme-lab-ca-trust.pem")
    moved = trust.rename(tmp_path / "moved.pem")
    with pytest.raises(IdentityError, match="acme-lab-ca-trust"):
        make_node("n", org, tmp_path / "n")
    make_node("n", CaFiles(org.cert, org.key, moved), tmp_path / "n")


def test_a_node_directly_under_the_root_works(tmp_path: Path) -> None:
    root = make_root("Acme", tmp_path)
    node = make_node("n", CaFiles(root.cert, root.key), tmp_path)
    assert node.trust is not None
    load_identity(IdentityFiles(node.cert, node.key, node.trust))


@pytest.mark.parametrize("wrong", [{"roles": {"boss"}}, {"san": ["späße.example"]}, {"days": 0}])
def test_wrong_wishes_are_refused(org: CaFiles, tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(IdentityError):
        make_node("n", org, tmp_path / "n", **wrong)  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match="file name"):
        make_node("///", org, tmp_path / "n")
    with pytest.raises(IdentityError):
        make_root("Acme", tmp_path / "n", country="Germany")


def test_renewal_keeps_key_names_and_peer_id(org: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", org, tmp_path, roles={"data"})
    before = inspected(old := load_certificate(node.cert))
    renew_node(node.cert, org, days=900)
    after = inspected(new := load_certificate(node.cert))
    assert (after.peer_id, new.subject, after.roles) == (before.peer_id, old.subject, before.roles)
    assert new.not_valid_after_utc > old.not_valid_after_utc
    assert new.serial_number != old.serial_number
    assert mode(node.cert) == 0o644


def test_renewal_keeps_the_chain_and_the_files_owner_and_mode(org: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", org, tmp_path)
    chain = org.cert.read_bytes()
    node.cert.write_bytes(node.cert.read_bytes() + chain)
    node.cert.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(node.cert, 1234, 2345)
    owner = (node.cert.stat().st_uid, node.cert.stat().st_gid)
    renew_node(node.cert, org, days=900)
    assert node.cert.read_bytes().endswith(chain)
    assert len(load_chain(node.cert)) == 2
    assert mode(node.cert) == 0o640
    assert (node.cert.stat().st_uid, node.cert.stat().st_gid) == owner


def test_an_organisation_made_elsewhere_renews_and_revokes(org: CaFiles, tmp_path: Path) -> None:
    """Its files have other names, and what is above it is not at hand."""
    node = make_node("n", org, tmp_path)
    elsewhere = CaFiles(tmp_path / "issuing.crt", tmp_path / "issuing.key")
    elsewhere.cert.write_bytes(org.cert.read_bytes())
    elsewhere.key.write_bytes(org.key.read_bytes())
    before = node.cert.read_bytes()
    renew_node(node.cert, elsewhere)
    assert node.cert.read_bytes() != before
    assert revoke(elsewhere, [node.cert], tmp_path / "crls.pem") == 2  # the earlier one, too
    assert org.trust is None or org.trust.exists()
    # what is named is checked
    with pytest.raises(IdentityError, match="nowhere"):
        renew_node(node.cert, CaFiles(elsewhere.cert, elsewhere.key, tmp_path / "nowhere.pem"))


def test_a_revocation_list_grows_and_is_bound_to_its_ca(org: CaFiles, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    one = make_node("one", org, tmp_path)
    two = make_node("two", org, tmp_path)
    assert revoke(org, [one.cert], crl) == 1
    assert revoke(org, [two.cert, one.cert], crl) == 2
    ca = x509.load_pem_x509_certificate(org.cert.read_bytes())
    signed = x509.load_pem_x509_crl(crl.read_bytes())
    assert signed.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    other = make_root("Other", tmp_path)
    with pytest.raises(IdentityError, match="its own list"):
        revoke(CaFiles(other.cert, other.key), [], crl)
    with pytest.raises(IdentityError, match="did not issue"):
        revoke(CaFiles(other.cert, other.key), [one.cert], tmp_path / "other.pem")


def test_who_was_renewed_is_revoked_with_the_earlier_certificates(org: CaFiles, tmp_path: Path) -> None:
    """A node that has kept an earlier file, or has not read the new one yet, would go on with it."""
    crl = tmp_path / "crl.pem"
    node = make_node("n", org, tmp_path)
    other = make_node("other", org, tmp_path)
    serials = [x509.load_pem_x509_certificate(node.cert.read_bytes()).serial_number]
    for _ in range(2):
        serials.append(renew_node(node.cert, org).serial_number)
    renew_node(other.cert, org)
    assert revoke(org, [node.cert], crl) == 3
    assert {entry.serial_number for entry in x509.load_pem_x509_crl(crl.read_bytes())} == set(serials)


def test_a_key_with_problems_is_told_of(org: CaFiles, tmp_path: Path) -> None:
    node = make_node("n", org, tmp_path)
    certificate = load_certificate(node.cert)
    assert key_beside(node.cert) == node.key
    assert key_problems(node.key, certificate) == []
    node.key.chmod(0o640)
    (problem,) = key_problems(node.key, certificate)
    assert "chmod 600" in problem
    chain = load_chain(tmp_path / "n-trust.pem")
    assert [is_self_signed(one) for one in chain] == [False, True]
    assert key_beside(tmp_path / "n-trust.pem") is None
    with pytest.raises(IdentityError, match="n-key"):
        load_chain(node.key)

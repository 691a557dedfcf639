"""Faults of certificates, keys and lists, with real files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from tests.cli.doctor.staging import only, reissue
from tests.support.network import Pki

from hypha.cli.doctor import checks
from hypha.cli.doctor.checks import Finding
from hypha.cli.doctor.gathering.machine import gather_identity
from hypha.cli.doctor.judging.machine import judge_identity
from hypha.pki.authority import revoke
from hypha.pki.identity import IdentityFiles


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


@pytest.fixture
def files(pki: Pki) -> IdentityFiles:
    return pki.files("worker", ("worker",), days=60)


def findings(
    files: IdentityFiles, component: str = "worker", require_roles: bool = True
) -> Iterator[Finding]:
    return judge_identity(gather_identity(files)[0], component, require_roles)


def test_nothing_is_found_with_good_files(files: IdentityFiles, pki: Pki) -> None:
    crl = pki.directory / "crls.pem"
    assert list(findings(replace(files, crls=crl))) == []
    revoke(pki.org, [pki.files("bad").cert], crl)
    assert list(findings(replace(files, crls=crl))) == []
    # a certificate without a role is good for those who want none
    assert list(findings(pki.files("plain", days=60), require_roles=False)) == []


def test_a_certificate_that_is_over(files: IdentityFiles, pki: Pki) -> None:
    reissue(files, pki.org, -9, -1)
    one = only(findings(files), checks.CERTIFICATE_EXPIRED)
    assert (one.severity, f"hypha-certutil renew {files.cert}" in one.mend) == ("error", True)


def test_a_certificate_that_is_not_valid_yet(files: IdentityFiles, pki: Pki) -> None:
    reissue(files, pki.org, 1, 90)
    assert "set the clock" in only(findings(files), checks.CERTIFICATE_EXPIRED).mend


def test_a_certificate_that_ends_soon(pki: Pki) -> None:
    one = only(findings(pki.files("worker", ("worker",), days=9)), checks.CERTIFICATE_EXPIRES)
    assert one.severity == "warning"


def test_the_ca_above_ends_soon(files: IdentityFiles) -> None:
    observed, _ = gather_identity(files)
    soon = replace(observed, ends={**observed.ends, "issuer": observed.now + timedelta(days=2)})
    assert str(files.trust) in only(judge_identity(soon, "worker"), checks.CERTIFICATE_EXPIRES).what


def test_a_key_that_others_can_read(files: IdentityFiles) -> None:
    files.key.chmod(0o644)
    one = only(findings(files), checks.KEY_READABLE)
    assert one.mend == f"`chmod 600 {files.key}`"


def test_a_key_of_another_certificate(files: IdentityFiles, pki: Pki) -> None:
    files.key.write_bytes(pki.files("other").key.read_bytes())
    assert "does not belong" in only(findings(files), checks.CERTIFICATE_UNUSABLE).what


def test_a_certificate_that_is_not_there(files: IdentityFiles) -> None:
    files.cert.unlink()
    assert "there is no such file" in only(findings(files), checks.CERTIFICATE_UNUSABLE).what


def test_a_trust_bundle_of_other_people(files: IdentityFiles, tmp_path: Path) -> None:
    files.trust.write_bytes(Pki(tmp_path / "others").files("x").trust.read_bytes())
    assert "trust bundle" in only(findings(files), checks.CERTIFICATE_UNUSABLE).what


def test_a_certificate_for_another_role(files: IdentityFiles) -> None:
    one = only(findings(files, "data"), checks.CERTIFICATE_ROLE)
    assert "--role data" in one.mend


def test_a_certificate_without_a_role(pki: Pki) -> None:
    assert "no role" in only(findings(pki.files("plain", days=60)), checks.CERTIFICATE_ROLE).what


def test_a_node_that_was_revoked(files: IdentityFiles, pki: Pki) -> None:
    crl = pki.directory / "crls.pem"
    revoke(pki.org, [files.cert], crl)
    assert "revoked" in only(findings(replace(files, crls=crl)), checks.CERTIFICATE_UNUSABLE).what


@pytest.mark.parametrize(("days", "words"), [(31, "is out of date since"), (28, "is out of date from")])
def test_a_revocation_list_that_nobody_has_renewed(
    files: IdentityFiles, pki: Pki, days: int, words: str
) -> None:
    crl = pki.directory / "crls.pem"
    revoke(pki.org, [pki.files("bad").cert], crl)
    observed, _ = gather_identity(replace(files, crls=crl))
    one = only(
        judge_identity(replace(observed, now=observed.now + timedelta(days=days)), "worker"), checks.CRL_OLD
    )
    assert (words in one.what, str(crl) in one.mend) == (True, True)

"""``hypha-certutil`` as a program: files, modes, refusals, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

CA = ("--ca-cert", "lab-ca-cert.pem", "--ca-key", "lab-ca-key.pem")


def certutil(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hypha.cli.certutil", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    made = [
        certutil(directory, "root", "-o", "Example"),
        certutil(
            directory,
            *("org", "-o", "Lab", "--root-cert", "example-ca-cert.pem", "--root-key", "example-ca-key.pem"),
        ),
        certutil(directory, "node", "-n", "w1", "--role", "worker", "--san", "w1.example.org,192.0.2.1", *CA),
    ]
    assert [one.returncode for one in made] == [0, 0, 0], [one.stderr for one in made]
    assert "PeerID 12D3KooW" in made[2].stdout
    return directory


def test_files_and_modes(pki: Path) -> None:
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in pki.iterdir()}
    assert modes == {
        "example-ca-cert.pem": "0o644",
        "example-ca-key.pem": "0o600",
        "lab-ca-cert.pem": "0o644",
        "lab-ca-key.pem": "0o600",
        "lab-ca-trust.pem": "0o644",
        "w1-cert.pem": "0o644",
        "w1-key.pem": "0o600",
        "w1-trust.pem": "0o644",
    }
    assert (pki / "w1-trust.pem").read_text().count("BEGIN CERTIFICATE") == 2, "organisation and root"


def test_nothing_is_overwritten(pki: Path) -> None:
    before = {path: path.read_bytes() for path in pki.iterdir()}
    again = certutil(pki, "node", "-n", "w1", *CA)
    clash = certutil(
        pki, "org", "-o", "Example", "--root-cert", "example-ca-cert.pem", "--root-key", "example-ca-key.pem"
    )
    assert (again.returncode, clash.returncode) == (2, 2)
    assert "nothing is overwritten" in again.stderr
    assert "Traceback" not in again.stderr + clash.stderr
    assert {path: path.read_bytes() for path in pki.iterdir()} == before


def test_show(pki: Path, tmp_path: Path) -> None:
    shown = certutil(pki, "show", "w1-cert.pem")
    assert shown.returncode == 0
    for words in ("roles        worker", "w1.example.org", "12D3KooW", "belongs to the certificate"):
        assert words in shown.stdout
    (tmp_path / "w1-cert.pem").write_bytes((pki / "w1-cert.pem").read_bytes())
    (tmp_path / "w1-key.pem").write_bytes((pki / "lab-ca-key.pem").read_bytes())
    (tmp_path / "w1-key.pem").chmod(0o644)
    bad = certutil(tmp_path, "show", "w1-cert.pem")
    assert bad.returncode == 1
    assert "chmod 600" in bad.stdout
    assert "does not belong" in bad.stdout


def test_renew_keeps_key_names_and_roles(pki: Path, tmp_path: Path) -> None:
    assert certutil(pki, "node", "-n", "old", "--role", "data", "--days", "1", *CA).returncode == 0
    before = certutil(pki, "show", "old-cert.pem").stdout.splitlines()
    renewed = certutil(pki, "renew", "old-cert.pem", "--days", "90", *CA)
    assert renewed.returncode == 0, renewed.stderr
    after = certutil(pki, "show", "old-cert.pem").stdout.splitlines()
    changed = [line.split()[0] for line, other in zip(after, before, strict=True) if line != other]
    assert changed == ["valid", "serial", "sha256"]
    foreign = certutil(
        pki, "renew", "old-cert.pem", "--ca-cert", "example-ca-cert.pem", "--ca-key", "example-ca-key.pem"
    )
    assert foreign.returncode == 2
    assert "did not issue it" in foreign.stderr
    for path in pki.glob("old-*"):
        path.unlink()


def test_an_organisation_may_be_limited_to_roles(pki: Path, tmp_path: Path) -> None:
    root = ("--root-cert", "example-ca-cert.pem", "--root-key", "example-ca-key.pem")
    made = certutil(pki, "org", "-o", "Limited", "--roles", "worker, data", *root, "-d", str(tmp_path))
    assert made.returncode == 0, made.stderr
    assert "may issue    data, worker" in certutil(tmp_path, "show", "limited-ca-cert.pem").stdout
    ca = ("--ca-cert", "limited-ca-cert.pem", "--ca-key", "limited-ca-key.pem")
    refused = certutil(tmp_path, "node", "-n", "s", "--role", "scheduler", *ca)
    assert refused.returncode == 2
    assert "may only vouch for the role data and worker" in refused.stderr
    assert certutil(tmp_path, "node", "-n", "w", "--role", "worker", *ca).returncode == 0
    assert certutil(pki, "org", "-o", "Wrong", "--roles", "boss", *root).returncode == 2


def test_a_node_without_a_role_is_told_how_it_gets_one(pki: Path, tmp_path: Path) -> None:
    ca = ("--ca-cert", str(pki / "lab-ca-cert.pem"), "--ca-key", str(pki / "lab-ca-key.pem"))
    made = certutil(tmp_path, "node", "-n", "plain", *ca)
    assert "hypha-certutil renew plain-cert.pem --role" in made.stdout
    assert "roles        none" in certutil(tmp_path, "show", "plain-cert.pem").stdout
    before = certutil(tmp_path, "show", "plain-cert.pem").stdout
    assert certutil(tmp_path, "renew", "plain-cert.pem", "--role", "worker", *ca).returncode == 0
    after = certutil(tmp_path, "show", "plain-cert.pem").stdout
    assert "roles        worker" in after
    assert [line for line in before.splitlines() if "PeerID" in line] == [
        line for line in after.splitlines() if "PeerID" in line
    ]


def test_revoke_makes_and_extends_a_list(pki: Path, tmp_path: Path) -> None:
    crl = tmp_path / "crl.pem"
    arguments = ("revoke", *CA, "--crl", str(crl))
    assert "lists 0 certificates" in certutil(pki, *arguments).stdout
    assert "lists 1 certificate\n" in certutil(pki, *arguments, "w1-cert.pem").stdout
    # again, and signed anew without another: still one
    assert "lists 1 certificate\n" in certutil(pki, *arguments, "w1-cert.pem").stdout
    assert "lists 1 certificate\n" in certutil(pki, *arguments).stdout
    listed = x509.load_pem_x509_crl(crl.read_bytes())
    serial = x509.load_pem_x509_certificate((pki / "w1-cert.pem").read_bytes()).serial_number
    assert [entry.serial_number for entry in listed] == [serial]
    before = crl.read_bytes()
    foreign = certutil(pki, *arguments, "example-ca-cert.pem")
    assert foreign.returncode == 2
    assert "did not issue it" in foreign.stderr
    assert crl.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("node", "-n", "x", "--role", "boss", *CA), "there is no role boss"),
        (("node", "-n", "x", "--ca-cert", "w1-cert.pem", "--ca-key", "w1-key.pem"), "CA"),
        (("node", "-n", "x", "--ca-cert", "lab-ca-cert.pem", "--ca-key", "w1-key.pem"), "key"),
        (("show", "nowhere.pem"), "nowhere.pem"),
    ],
)
def test_refusals_name_the_cause(pki: Path, arguments: tuple[str, ...], told: str) -> None:
    refused = certutil(pki, *arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert told in refused.stderr
    assert "Traceback" not in refused.stderr

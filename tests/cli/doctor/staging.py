"""What the doctor's tests share: a node's files, and that a fault that was staged is what is found."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from tests.support.network import Pki

from hypha.cli.doctor.checks import Check, Finding
from hypha.config.job import JobConfig
from hypha.config.models import WorkerConfig
from hypha.pki.authority import CaFiles
from hypha.pki.identity import IdentityFiles


def only(findings: Iterable[Finding], check: Check) -> Finding:
    """The one finding that there is, and it is of ``check``."""
    listed = list(findings)
    assert [one.check.name for one in listed] == [check.name], "\n".join(map(str, listed))
    return listed[0]


def among(findings: Iterable[Finding], check: Check) -> Finding:
    """The finding of ``check``, beside what else follows from the fault."""
    listed = list(findings)
    found = [one for one in listed if one.check == check]
    assert len(found) == 1, "\n".join(map(str, listed)) or "nothing is found"
    return found[0]


def reissue(files: IdentityFiles, ca: CaFiles, start_days: int, end_days: int) -> None:
    """The same certificate with other dates, signed by its CA."""
    old = x509.load_pem_x509_certificate(files.cert.read_bytes())
    key = serialization.load_pem_private_key(ca.key.read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
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
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    files.cert.write_bytes(builder.sign(key, None).public_bytes(serialization.Encoding.PEM))


def worker_config(pki: Pki, directory: Path, **changes: Any) -> WorkerConfig:
    """A worker that offers little, so that any machine has it."""
    files = pki.files("worker", ("worker",))
    settings: dict[str, Any] = {
        "cert_pem": files.cert,
        "key_pem": files.key,
        "trust_pem": files.trust,
        "listen_addresses": ["/ip4/127.0.0.1/tcp/0"],
        "gateway_addresses": ["/ip4/127.0.0.1/tcp/1"],
        "exclude_cidr": [],
        "work_dir": directory / "work",
        "resources": {"cpu": 1.0, "memory": 0.1, "storage": 0.1},
        # somebody else's, so that nobody imports torch for them
        "executors": [
            {"class": "train", "name": "diloco-transformer", "cmd": "true"},
            {"class": "aggregate", "name": "parameter-server", "cmd": "true"},
        ],
    }
    return WorkerConfig(**{**settings, **changes})


def job_config(**changes: Any) -> JobConfig:
    """A job that such a worker can do."""
    settings: dict[str, Any] = {
        "name": "digits",
        "model": {"type": "torch", "entrypoint": "models:make"},
        "dataset": {"dataset": "digits"},
        "rounds": {"update_rounds": 2, "avg_samples_between_updates": 100},
        "resources": {"worker": {"memory": 0.1}, "parameter_server": {"memory": 0.1}},
        "output": "out",
    }
    return JobConfig(**{**settings, **changes})

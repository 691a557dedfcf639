"""A whole network whose certificates were made with the ``openssl`` program, by the book."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.system import System, digits_dataset, digits_job

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program"),
]

CA = "basicConstraints = critical, CA:TRUE\nkeyUsage = critical, keyCertSign, cRLSign\n"
NODE = (
    "basicConstraints = critical, CA:FALSE\n"
    "keyUsage = critical, digitalSignature\n"
    "extendedKeyUsage = serverAuth, clientAuth\n"
    "subjectAltName = URI:urn:hypha:role:{role}\n"
)


class OpenSsl:
    """Root -> organisation -> nodes, in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._extensions("ca", CA)
        self._key("root")
        self._run("req -x509 -new -key root-key.pem -subj /CN=Root -days 30 -out root.pem", "ca")
        self._key("org")
        self._sign("org", "/CN=Organisation", "root.pem", "root-key.pem", "ca")
        trust = (directory / "org-cert.pem").read_bytes() + (directory / "root.pem").read_bytes()
        (directory / "trust.pem").write_bytes(trust)

    def node(self, name: str, role: str) -> None:
        """``<name>-cert.pem``, ``<name>-key.pem`` and ``<name>-trust.pem``."""
        self._extensions(name, NODE.format(role=role))
        self._key(name)
        self._sign(name, f"/CN={name}", "org-cert.pem", "org-key.pem", name)
        shutil.copy(self.directory / "trust.pem", self.directory / f"{name}-trust.pem")

    def _key(self, name: str) -> None:
        self._run(f"genpkey -algorithm ed25519 -out {name}-key.pem")
        (self.directory / f"{name}-key.pem").chmod(0o600)

    def _sign(self, name: str, subject: str, ca: str, ca_key: str, extensions: str) -> None:
        self._run(f"req -new -key {name}-key.pem -subj {subject} -out {name}.csr")
        self._run(
            f"x509 -req -in {name}.csr -CA {ca} -CAkey {ca_key} -CAcreateserial -days 30 "
            f"-extfile {extensions}.ext -out {name}-cert.pem"
        )

    def _extensions(self, name: str, text: str) -> None:
        (self.directory / f"{name}.ext").write_text(text)

    def _run(self, command: str, section: str | None = None) -> None:
        arguments = ["openssl", *command.split()]
        if section is not None:
            # ``req -x509`` takes extensions one by one
            for line in (self.directory / f"{section}.ext").read_text().splitlines():
                arguments += ["-addext", line.replace(" = ", "=")]
        subprocess.run(arguments, cwd=self.directory, check=True, capture_output=True)


async def test_a_network_certified_with_openssl_trains_and_keeps_strangers_out(
    system: System, tmp_path: Path
) -> None:
    """Roles in the certificates count: everybody requires them. A scheduler with the same name and role under
    another root is refused, says why, and goes on trying.
    """
    made = OpenSsl(tmp_path / "openssl")
    for name, role in {
        "gateway": "gateway",
        "data": "data",
        "worker-1": "worker",
        "worker-2": "worker",
        "scheduler": "scheduler",
    }.items():
        made.node(name, role)
    stranger = OpenSsl(tmp_path / "stranger")
    stranger.node("stranger", "scheduler")
    # a system makes only those that it lacks
    system.pki = made.directory
    dataset = digits_dataset(tmp_path)
    await system.gateway(planned={**system.plan_gateway(), "require_roles": True})
    await system.data("data", dataset, require_roles=True)
    for name in ("worker-1", "worker-2"):
        await system.worker(name, require_roles=True)
    scheduler = await system.scheduler(digits_job(None, 2, 3), require_roles=True)
    system.pki = stranger.directory
    refused = await system.scheduler(digits_job(None, 1, 1, name="refused"), name="stranger")
    await system.logged(refused, "No gateway can be reached")
    await system.logged(refused, "not in the trust bundle of this node")
    assert refused.process.poll() is None
    assert "Connected to gateway" not in refused.log.read_text()
    assert await system.ended(scheduler) == 0, scheduler.tail()
    assert await system.replay("job", dataset, None) <= 1e-5
    assert not list((tmp_path / "pki").glob("worker-*")), "no certificate of ours was used"

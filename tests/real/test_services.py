"""systemd's own judgement of the services in deploy/systemd (Debian's systemd; it need not run here)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SERVICES = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
#: systemd's figure for what a service could still do to its machine: 10 is all, "OK" begins at 4.9
EXPOSED = 2.5

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs Debian's systemd"),
]


def analyse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_a_service_is_understood_and_exposes_little(path: Path, tmp_path: Path) -> None:
    here = tmp_path / path.name
    # the program must be there
    here.write_text(path.read_text().replace("/opt/hypha/bin", str(Path(sys.executable).parent)))
    verified = analyse("verify", "--man=no", str(here))
    assert (verified.returncode, verified.stdout) == (0, "")
    judged = analyse("security", "--offline=true", str(here))
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", judged.stdout)
    assert exposure is not None, judged.stdout
    assert float(exposure[1]) <= EXPOSED


def test_what_is_wrong_in_a_service_is_told(tmp_path: Path) -> None:
    here = tmp_path / "wrong.service"
    here.write_text("[Service]\nExecStart=/bin/true\nProtectSystems=strict\n")
    assert "Unknown key 'ProtectSystems'" in analyse("verify", "--man=no", str(here)).stdout

"""``hypha doctor`` as somebody runs it: whose configuration it is, what it prints, how it ends."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.doctor.staging import job_config, only
from tests.support.network import Pki
from typer.testing import CliRunner

from hypha.cli.doctor import checks
from hypha.cli.doctor.gathered import Observations, Unknown
from hypha.cli.doctor.subject import Subject, read_job, read_subject
from hypha.cli.doctor.whole import judge
from hypha.cli.hypha import app
from hypha.errors import ConfigError

FOREIGN = '[[executors]]\nclass = "train"\nname = "diloco-transformer"\ncmd = "true"\n'


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


def write(pki: Pki, path: Path, component: str, more: str = "") -> Path:
    """A configuration of that component with ``more`` below what all have."""
    files = pki.files(component, (component,), days=60)
    shared = {"cert_pem": files.cert, "key_pem": files.key, "trust_pem": files.trust}
    lines = [f'{key} = "{value}"' for key, value in shared.items()]
    path.write_text("\n".join([*lines, 'listen-addresses = ["/ip4/127.0.0.1/tcp/0"]', more]))
    return path


def gateways(*ports: int) -> str:
    return f"gateway_addresses = {[f'/ip4/127.0.0.1/tcp/{port}' for port in ports]}\nexclude_cidr = []\n"


def doctor(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hypha.cli.hypha", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, **options)


# --- whom to look at -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "more"),
    [
        ("worker", gateways(1) + "[resources]\nmemory = 1\n"),
        ("worker", gateways(1)),  # by its certificate's role
        ("data", gateways(1) + 'dataset-path = "."\n'),
        ("gateway", 'external_addresses = ["/ip4/192.0.2.1/tcp/8080"]\n'),
        ("gateway", 'external_addresses = ["/ip4/192.0.2.1/tcp/8080"]\nmax-circuits = 3\n'),
    ],
)
def test_whose_configuration_it_is_follows_from_the_file(
    pki: Pki, tmp_path: Path, component: str, more: str
) -> None:
    subject = read_subject(write(pki, tmp_path / "config.toml", component, more))
    assert (subject.component, subject.problems) == (component, ())
    assert subject.config is not None


def test_a_file_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with pytest.raises(ConfigError, match="there is no such file"):
        read_subject(path)
    path.write_text("not toml at all")
    with pytest.raises(ConfigError, match="not TOML"):
        read_subject(path)
    path.write_text('log_level = "info"\n')
    with pytest.raises(ConfigError, match="--component gateway"):
        read_subject(path)
    assert read_subject(path, "worker").component == "worker"


def test_of_a_schedulers_configuration_the_job_alone_is_read(tmp_path: Path) -> None:
    """Its certificates and its model are on another machine."""
    path = tmp_path / "scheduler.toml"
    path.write_text(
        'cert_pem = "nowhere.pem"\nsomething_new = 1\n'
        '[scheduler.job]\nname = "theirs"\noutput = "out"\n'
        '[scheduler.job.model]\ntype = "causal-lm"\npath = "/not/here"\n'
        '[scheduler.job.dataset]\ndataset = "digits"\n'
    )
    assert read_job(path).name == "theirs"
    path.write_text("[scheduler]\n")
    with pytest.raises(ConfigError, match=r"scheduler\.job"):
        read_job(path)


def test_a_configuration_with_a_mistake_is_a_finding_and_its_certificate_is_looked_at(
    pki: Pki, tmp_path: Path
) -> None:
    path = write(pki, tmp_path / "worker.toml", "worker", gateways(1) + "[resources]\nmemry = 1\n")
    subject = read_subject(path)
    assert subject.files is not None
    one = only(judge(subject, Observations()), checks.CONFIGURATION)
    assert ("did you mean memory" in one.what, f"hypha-worker validate -c {path}" in one.mend) == (True, True)


def test_what_could_not_be_found_out_is_a_note() -> None:
    observed = Observations(unknown=(Unknown("who serves 'digits'", "no gateway can be asked"),))
    one = only(judge(Subject(), observed), checks.NOT_CHECKED)
    assert one.what == "who serves 'digits' could not be found out: no gateway can be asked"


def test_a_data_node_that_does_not_serve_what_the_job_wants(pki: Pki, tmp_path: Path) -> None:
    from hypha.cli.doctor.gathered import ServiceObservations

    path = write(pki, tmp_path / "data.toml", "data", gateways(1) + 'dataset-path = "."\n')
    subject = Subject("data", path, read_subject(path).config, job=job_config())
    one = only(judge(subject, Observations(served=ServiceObservations(("digits-2",)))), checks.DATASET_NAME)
    assert "wants 'digits', and this data node serves 'digits-2'" in one.what
    silent = ServiceObservations(("digits",), announced=False)
    only(judge(subject, Observations(served=silent)), checks.DATASET_NOT_ANNOUNCED)


# --- what it prints and how it ends ----------------------------------------------------------------------


def test_without_a_configuration_the_machine_is_looked_at(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.stdout) == (0, "OK: nothing is found\n")
    for arguments in (["--peer", "/ip4/127.0.0.1/tcp/1"], ["--dataset", "digits"], ["--component", "boss"]):
        assert CliRunner().invoke(app, ["doctor", *arguments]).exit_code == 2


def test_several_faults_are_told_the_gravest_first_with_exit_code_8(pki: Pki, tmp_path: Path) -> None:
    more = gateways(1) + f'work_dir = "{tmp_path}"\n[resources]\nmemory = 999999\n' + FOREIGN
    path = write(pki, tmp_path / "worker.toml", "worker", more)
    result = doctor("-c", path)
    lines = result.stdout.splitlines()
    assert result.returncode == 8, result.stdout + result.stderr
    assert lines[0].startswith(f"worker of {path} ")
    assert lines[0].endswith("), not running here")
    told = [line for line in lines if line.startswith(("error", "warning", "note"))]
    assert [line.split(": ")[1] for line in told] == ["gateway-unreachable", "resources-missing"]
    assert "To mend it: start the gateway" in told[0]
    assert lines[-1] == "1 error, 1 warning, 0 notes"
    assert result.stderr == ""


def test_warnings_alone_give_exit_code_7_and_machines_read_json(pki: Pki, tmp_path: Path) -> None:
    """A gateway that may open fewer files than it may have connections."""
    more = 'external_addresses = ["/ip4/192.0.2.1/tcp/8080"]\n'
    path = write(pki, tmp_path / "gateway.toml", "gateway", more)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    result = doctor("-c", path, "--offline", "--json", preexec_fn=limit)
    assert result.returncode == 7, result.stdout + result.stderr
    whole = json.loads(result.stdout)
    assert (whole["component"], whole["exit_code"], whole["configuration"]) == ("gateway", 7, str(path))
    (finding,) = whole["findings"]
    assert finding["check"] == "file-descriptors"
    assert finding.keys() == {"check", "severity", "what", "why", "mend", "symptom"}
    assert whole["facts"]["machine"]["open_files"] == 512
    assert whole["facts"]["identity"]["roles"] == ["gateway"]


def test_a_key_that_others_can_read_is_told_with_the_command_that_mends_it(
    pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(pki, tmp_path / "config.toml", "data", gateways(1) + 'dataset-path = "."\n')
    subject = read_subject(path)
    assert subject.files is not None
    subject.files.key.chmod(0o640)
    (tmp_path / "part-0.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--offline"])
    assert result.exit_code == 8
    assert f"To mend it: `chmod 600 {subject.files.key}`" in result.stdout

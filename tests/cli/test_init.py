"""``init`` and ``validate``: what is written validates, names every key, and is never overwritten."""

from __future__ import annotations

import importlib
import importlib.util
import ipaddress
import json
import re
import socket
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from hypha.config.models import COMPONENTS, SchedulerConfig
from hypha.config.section import Section
from hypha.errors import ConfigError

LOCAL = "/ip4/127.0.0.1/tcp/8080"
ARGUMENTS = {
    "gateway": ["--external", LOCAL, "--listen", LOCAL],
    "worker": ["--gateway", LOCAL, "--work-dir", "w", "--gpu", "3"],
    "data": ["--gateway", LOCAL, "--dataset-path", "digits"],
    "scheduler": ["--gateway", LOCAL, "--model", "model", "--dataset", "digits"],
}


def run(program: str, *arguments: str, ok: bool = True) -> str:
    app = importlib.import_module(f"hypha.cli.{program}").app
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code == 0) is ok, result.output
    return result.output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "digits").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def keys_of(model: type[Section], prefix: str = "") -> set[str]:
    keys = set()
    for name, info in model.model_fields.items():
        keys.add(info.alias if info.alias and "-" not in info.alias else name)
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                keys |= keys_of(part)
    return keys


@pytest.mark.parametrize("program", COMPONENTS)
def test_what_init_writes_validates_and_names_every_key(program: str, here: Path, pki: Path) -> None:
    run(program, "init", "-o", "conf/c.toml", "-n", program, "--pki", str(pki), *ARGUMENTS[program])
    text = (here / "conf" / "c.toml").read_text()
    assert "FILL IN" not in text
    assert run(program, "validate", "--config", "conf/c.toml").startswith("OK: ")
    assert run(program, "--config", "conf/c.toml", "--validate").startswith("OK: ")
    written = set(re.findall(r"^#?(\w+) =", text, re.MULTILINE))
    tables = {name.split(".")[-1] for name in re.findall(r"^#?\[+([\w.]+)\]+$", text, re.MULTILINE)}
    assert keys_of(COMPONENTS[program]) == written | tables


@pytest.mark.parametrize("program", COMPONENTS)
def test_the_commented_defaults_are_the_defaults(program: str, here: Path, pki: Path) -> None:
    from hypha.config.reading.loading import load_config

    run(program, "init", "-o", "c.toml", "-n", program, "--pki", str(pki), *ARGUMENTS[program])
    text = (here / "c.toml").read_text()
    # every commented key with a value becomes active; tables that are commented whole stay so
    lines, active = [], True
    for line in text.splitlines():
        if line.startswith(("[", "#[")):
            active = line.startswith("[")
        lines.append(line[1:] if active and re.match(r"#\w+ = ", line) else line)
    uncommented = here / "u.toml"
    uncommented.write_text("\n".join(lines))
    assert uncommented.read_text() != text
    plain = load_config(COMPONENTS[program], here / "c.toml", environ={}).model_dump()
    other = load_config(COMPONENTS[program], uncommented, environ={}).model_dump()
    different = {key for key, value in plain.items() if other[key] != value}
    # written into a file, a path is relative to it
    assert different <= {"work_dir", "state_dir"}


def test_a_worker_says_what_was_found_and_what_is_more_than_that(here: Path, pki: Path) -> None:
    arguments = ("-n", "worker", "--pki", str(pki), *ARGUMENTS["worker"], "--cpu", "4096")
    made = run("worker", "init", *arguments)
    assert "  found memory: " in made
    assert "note: resources.cpu = 4096 is more than this machine has (" in made
    assert tomllib.loads(Path("config.toml").read_text())["resources"]["cpu"] == 4096
    told = run("worker", "validate")
    assert "limit memory: " in told
    assert "advice: resources.cpu = 4096 is more than this machine has (" in told
    assert "resource cpu: 4096 offered" in run("worker", "validate", "--set", "detect_resources=false")


def test_without_what_only_the_operator_knows_it_says_what_to_fill_in(here: Path) -> None:
    output = run("worker", "init")
    assert "fill in gateway_addresses" in output
    assert "# FILL IN: " in Path("config.toml").read_text()
    with pytest.raises(ConfigError) as caught:
        run("worker", "validate")
    assert {problem.key for problem in caught.value.problems} == {"cert_pem", "key_pem", "trust_pem"}
    assert all(problem.source == "config.toml" and problem.line for problem in caught.value.problems)


def test_it_never_overwrites_without_force(here: Path) -> None:
    Path("config.toml").write_text("precious")
    with pytest.raises(ConfigError, match="--force"):
        run("gateway", "init", "--external", LOCAL)
    assert Path("config.toml").read_text() == "precious"
    run("gateway", "init", "--external", LOCAL, "--force")
    assert tomllib.loads(Path("config.toml").read_text())["external_addresses"] == [LOCAL]
    assert [path.name for path in here.iterdir() if path.is_file()] == ["config.toml"]


def test_a_local_gateway_is_not_excluded(here: Path) -> None:
    run("worker", "init", "--gateway", "/ip4/10.1.2.3/tcp/1")
    excluded = tomllib.loads(Path("config.toml").read_text())["exclude_cidr"]
    assert "10.0.0.0/8" not in excluded
    assert "127.0.0.0/8" in excluded


def test_identity_and_configuration_problems_come_together(here: Path, pki: Path) -> None:
    run("worker", "init", "-n", "worker", "--pki", str(pki), *ARGUMENTS["worker"])
    key = here / "open.pem"
    key.write_bytes((pki / "worker-key.pem").read_bytes())
    key.chmod(0o644)
    text = Path("config.toml").read_text()
    text = re.sub(r"^key_pem = .*$", 'key_pem = "open.pem"', text, flags=re.MULTILINE)
    Path("config.toml").write_text(text.replace("gpu = 3", "gpu = -3"))
    with pytest.raises(ConfigError) as caught:
        run("worker", "validate")
    told = [(problem.key, problem.message) for problem in caught.value.problems]
    assert [key for key, _ in told] == ["key_pem", "resources.gpu"]
    assert "chmod 600" in told[0][1]


def test_a_certificate_for_another_role_is_told_before_others_refuse_it(here: Path, pki: Path) -> None:
    run("scheduler", "init", "-n", "worker", "--pki", str(pki), *ARGUMENTS["scheduler"])
    with pytest.raises(ConfigError) as caught:
        run("scheduler", "validate")
    (problem,) = caught.value.problems
    assert (problem.key, problem.source) == ("cert_pem", "config.toml")
    assert "for the role worker" in problem.message
    assert "--role scheduler" in problem.message


def test_a_certificate_without_a_role_is_told_with_the_command_that_gives_it_one(
    here: Path, strangers: Path
) -> None:
    run("worker", "init", "-n", "worker", "--pki", str(strangers), *ARGUMENTS["worker"])
    with pytest.raises(ConfigError) as caught:
        run("worker", "validate")
    (problem,) = caught.value.problems
    assert problem.key == "cert_pem"
    assert "carries no role" in problem.message
    assert re.search(r"`hypha-certutil renew \S+worker-cert.pem --role worker ", problem.message)
    # a network of older certificates may go on as it was
    run("worker", "validate", "--set", "require_roles=false")


def test_a_worker_without_torch_needs_programs_of_its_own(
    here: Path, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would offer, and fail each job that it is given."""
    run("worker", "init", "-n", "worker", "--pki", str(pki), *ARGUMENTS["worker"])
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
    )
    with pytest.raises(ConfigError) as caught:
        run("worker", "validate")
    (problem,) = caught.value.problems
    assert problem.key == "executors[0]"
    assert "hypha-train[train]" in problem.message
    with Path("config.toml").open("a") as config:
        config.write('[[executors]]\nclass = "train"\nname = "mine"\ncmd = "/bin/true"\n')
    run("worker", "validate")


def test_what_is_far_off_is_advised_on_and_still_valid(here: Path, pki: Path) -> None:
    arguments = ("-n", "scheduler", "--pki", str(pki), "--rounds", "8", *ARGUMENTS["scheduler"])
    run("scheduler", "init", *arguments)
    assert run("scheduler", "validate").count("\n") == 1
    momentum, batch = "scheduler.job.outer_optimizer.momentum", "scheduler.job.rounds.batch_size"
    told = run("scheduler", "validate", "--set", f"{momentum}=0.9", "--set", f"{batch}=1").splitlines()
    assert told[0].startswith("OK: config.toml")
    assert [line.split(": ")[:2] for line in told[1:]] == [["advice", momentum], ["advice", batch]]
    assert "learning_rate 1 and momentum 0.6" in told[1]
    # an error is no advice, and there is none beside it
    with pytest.raises(ConfigError) as caught:
        run("scheduler", "validate", "--set", f"{momentum}=1.5", "--set", f"{batch}=1")
    assert [problem.key for problem in caught.value.problems] == [momentum]


def test_without_a_file_it_is_said_where_one_would_come_from(here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run("worker", "validate")
    assert "hypha-worker init" in str(caught.value.problems[0])


def test_flags_of_run_are_checked_like_the_file(here: Path, pki: Path) -> None:
    run("worker", "init", "-n", "worker", "--pki", str(pki), *ARGUMENTS["worker"])
    with pytest.raises(ConfigError) as caught:
        run("worker", "run", "--listen", "nowhere", "--set", "offer.price=-1", "--set", "ofer.price=1")
    assert [problem.source for problem in caught.value.problems] == [
        "--listen",
        "--set ofer.price",
        "--set offer.price",
    ]


def test_a_check_that_is_wrong_can_be_left_out(
    here: Path, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("scheduler", "init", "-n", "scheduler", "--pki", str(pki), *ARGUMENTS["scheduler"])
    checks = []

    def note(component: str, config: SchedulerConfig, service: object) -> int:
        checks.append(config.scheduler.job.check)
        return 0

    monkeypatch.setattr("hypha.cli.scheduler.run_service", note)
    run("scheduler", "run")
    run("scheduler", "run", "--no-check")
    assert checks == ["full", "none"]


def test_every_dataset_that_was_given_is_written(here: Path, pki: Path) -> None:
    (here / "more").mkdir()
    given = ["--dataset-path", "digits", "--dataset-path", "more"]
    run("data", "init", "-o", "c.toml", "-n", "data", "--pki", str(pki), "--gateway", LOCAL, *given)
    config = tomllib.loads((here / "c.toml").read_text())
    assert [Path(one["path"]).name for one in config["datasets"]] == ["digits", "more"]
    assert run("data", "validate", "--config", "c.toml").startswith("OK: ")


def test_nodes_of_one_machine_do_not_share_an_address(here: Path, pki: Path) -> None:
    addresses = []
    for name in ("worker-1", "worker-2"):
        run("worker", "init", "-o", f"{name}.toml", "-n", name, "--pki", str(pki), "--gateway", LOCAL)
        addresses.append(tomllib.loads((here / f"{name}.toml").read_text())["http_address"])
    assert addresses == ["127.0.0.1:9103", "127.0.0.1:9113"]
    run("worker", "init", "-o", "other.toml", "--pki", str(pki), "--gateway", LOCAL, "--http", "0.0.0.0:1")
    assert tomllib.loads((here / "other.toml").read_text())["http_address"] == "0.0.0.0:1"


def test_a_worker_offers_what_the_machine_has(here: Path, pki: Path) -> None:
    run("worker", "init", "-o", "c.toml", "-n", "worker", "--pki", str(pki), "--gateway", LOCAL)
    resources = tomllib.loads((here / "c.toml").read_text())["resources"]
    assert resources["cpu"] >= 0.1
    assert resources["memory"] > 0
    assert resources["storage"] > 0


def test_a_plain_model_by_its_entrypoint(here: Path, pki: Path) -> None:
    arguments = ["--gateway", LOCAL, "--dataset", "digits", "--entrypoint", "package.module:Model"]
    run("scheduler", "init", "-o", "c.toml", "-n", "scheduler", "--pki", str(pki), *arguments)
    model = tomllib.loads((here / "c.toml").read_text())["scheduler"]["job"]["model"]
    assert model == {"type": "torch", "entrypoint": "package.module:Model"}
    assert "FILL IN" not in (here / "c.toml").read_text()
    run("scheduler", "init", "-o", "d.toml", "--model", "model", *arguments, ok=False)


def test_the_task_is_that_of_the_model(here: Path, pki: Path) -> None:
    def task(*arguments: str) -> str:
        run("scheduler", "init", "-o", "c.toml", "--force", "--dataset", "d", "--pki", str(pki), *arguments)
        kind = tomllib.loads((here / "c.toml").read_text())["scheduler"]["job"]["model"]["type"]
        assert isinstance(kind, str)
        return kind

    file = here / "model" / "config.json"
    for architecture, kind in (
        ("GPT2LMHeadModel", "causal-lm"),
        ("LlamaForCausalLM", "causal-lm"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("MaskFormerForInstanceSegmentation", "instance-segmentation"),
        ("SomethingElse", "image-classification"),
    ):
        file.write_text(json.dumps({"architectures": [architecture]}))
        assert task("--model", "model") == kind
    assert task("--model", "model", "--model-type", "masked-lm") == "masked-lm"
    file.write_text("[")
    assert task("--model", "model") == "image-classification"
    assert "causal-lm?" in run("scheduler", "init", "--model-type", "casual-lm", ok=False)


@pytest.mark.parametrize("component", ["gateway", "worker", "data", "scheduler"])
def test_a_network_of_the_operators_own_is_taken_out_of_the_excluded(here: Path, component: str) -> None:
    allowed = ["--allow-cidr", "10.0.0.0/8", "--allow-cidr", "192.168.4.0/24"]
    run(component, "init", *allowed)
    excluded = tomllib.loads(Path("config.toml").read_text())["exclude_cidr"]
    assert "10.0.0.0/8" not in excluded
    assert "172.16.0.0/12" in excluded
    networks = [ipaddress.ip_network(text) for text in excluded]
    for address, is_out in (("192.168.4.7", False), ("192.168.5.7", True), ("127.0.0.1", True)):
        assert any(ipaddress.ip_address(address) in one for one in networks) is is_out
    with pytest.raises(ConfigError, match="--allow-cidr lab: it is no network"):
        run(component, "init", "--force", "--allow-cidr", "lab")


def test_a_gateway_by_its_name_in_a_private_network_is_dialled_directly(
    here: Path, pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lookup(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host != "gateway.lab":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.3.0.7", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    arguments = ["init", "-n", "worker", "--pki", str(pki), "--gateway"]
    run("worker", *arguments, "/dns4/gateway.lab/tcp/8080", "-o", "a.toml")
    excluded = tomllib.loads((here / "a.toml").read_text())["exclude_cidr"]
    assert "10.0.0.0/8" not in excluded
    assert "192.168.0.0/16" in excluded
    said = run("worker", *arguments, "/dns4/gone.lab/tcp/8080", "-o", "b.toml")
    assert "note: gone.lab has no address here now" in said
    assert "exclude_cidr" not in tomllib.loads((here / "b.toml").read_text())

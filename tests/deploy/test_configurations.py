"""What is deployed fits together: ports, files, jobs and services; programs judge it in tests/real."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import lint
from hypha.config.models import COMPONENTS

DEPLOY = lint.ROOT / "deploy"
SERVICES = sorted((DEPLOY / "systemd").iterdir())


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


# --- the collector ----------------------------------------------------------------------------------


def test_each_pipeline_uses_what_is_declared_and_nothing_that_was_removed() -> None:
    config = load("otel-collector-config.yaml")
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics", "logs"}
    used: dict[str, set[str]] = {"receivers": set(), "processors": set(), "exporters": set()}
    for pipeline in pipelines.values():
        for kind, names in pipeline.items():
            used[kind] |= set(names)
    assert used == {kind: set(config[kind]) for kind in used}
    assert {name.partition("/")[0] for name in used["exporters"]} == {"prometheus", "otlp_grpc", "otlp_http"}
    # the specification's ports
    assert config["receivers"]["otlp"]["protocols"] == {
        "grpc": {"endpoint": "0.0.0.0:4317"},
        "http": {"endpoint": "0.0.0.0:4318"},
    }
    assert config["exporters"]["prometheus"]["endpoint"] == "0.0.0.0:9090"


# --- Prometheus -------------------------------------------------------------------------------------


def test_there_is_a_job_for_each_component_and_the_rules_know_no_other() -> None:
    config = load("prometheus.yml")
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    assert jobs == {f"hypha-{component}" for component in COMPONENTS}
    for job in config["scrape_configs"]:
        for one in job["file_sd_configs"]:
            for name in one["files"]:
                assert load(name)[0]["targets"]
    rules = (DEPLOY / "rules" / "hypha.rules.yml").read_text()
    assert set(re.findall(r'job="([^"$]+)"', rules)) <= jobs


def test_alertmanager_sends_to_receivers_that_are_there_and_holds_twins_back() -> None:
    config = load("alertmanager.yml")
    receivers = {one["name"] for one in config["receivers"]}
    routes = [config["route"], *config["route"]["routes"]]
    assert {one["receiver"] for one in routes} == receivers
    rules = [rule for group in load("rules/hypha.rules.yml")["groups"] for rule in group["rules"]]
    for rule in rules:
        twin = rule["alert"].endswith(lint.TWIN)
        assert (rule["labels"].get("absence") == "true") is twin, rule["alert"]
        if twin:
            (of,) = (one for one in rules if f"{one['alert']}{lint.TWIN}" == rule["alert"])
            assert of["labels"]["subject"] == rule["labels"]["subject"]
    named = {
        name
        for one in config["inhibit_rules"]
        for matcher in one["source_matchers"] + one["target_matchers"]
        if matcher.startswith("alertname")
        for name in matcher.split('"')[1].split("|")
    }
    assert named <= {rule["alert"] for rule in rules}


# --- compose ----------------------------------------------------------------------------------------


def test_compose_names_files_that_are_there_and_images_with_a_version() -> None:
    compose = load("compose.yaml")
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]), name
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"]


def test_whoever_is_named_by_another_is_a_service_of_compose() -> None:
    services = set(load("compose.yaml")["services"])
    collector = load("otel-collector-config.yaml")["exporters"]
    prometheus = load("prometheus-otlp.yml")
    sources = load("grafana/provisioning/datasources/hypha.yaml")["datasources"]
    addresses = [
        collector["otlp_grpc/jaeger"]["endpoint"],
        collector["otlp_http/loki"]["endpoint"],
        prometheus["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"][0],
        prometheus["scrape_configs"][0]["static_configs"][0]["targets"][0],
        *(source["url"] for source in sources),
    ]
    assert {re.sub(r"^\w+://", "", one).split(":")[0] for one in addresses} <= services


def test_grafana_finds_the_dashboards_where_compose_puts_them() -> None:
    (provider,) = load("grafana/provisioning/dashboards/hypha.yaml")["providers"]
    mounts = dict(one.split(":")[:2] for one in load("compose.yaml")["services"]["grafana"]["volumes"])
    assert mounts["./dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"


# --- systemd ----------------------------------------------------------------------------------------


class _Unit(configparser.RawConfigParser):
    """A unit: keys keep their case, and those that stand there twice all their values."""

    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read_string(path.read_text())
        self.lines = path.read_text().splitlines()

    def values_of(self, key: str) -> list[str]:
        return [line.partition("=")[2] for line in self.lines if line.startswith(f"{key}=")]


def test_there_is_a_service_for_each_component() -> None:
    names = {path.name.removeprefix("hypha-").removesuffix(".service").rstrip("@") for path in SERVICES}
    assert names == set(COMPONENTS)


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_a_service_is_hardened_and_its_key_is_a_credential(path: Path) -> None:
    unit = _Unit(path)
    service = unit["Service"]
    component = path.name.removeprefix("hypha-").removesuffix(".service").rstrip("@")
    assert service["ExecStart"] == f"/opt/hypha/bin/hypha-{component} run --config %d/config.toml"
    for key, value in {
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "NoNewPrivileges": "yes",
        "DynamicUser": "yes",
        "CapabilityBoundingSet": "",
        "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX AF_NETLINK",
        "StateDirectory": f"hypha-{component}",
        "Restart": "on-failure",
    }.items():
        assert service[key] == value, key
    credentials = dict(one.split(":") for one in unit.values_of("LoadCredential"))
    assert set(credentials) == {"config.toml", "key.pem"}
    assert all(source.startswith("/etc/hypha/") for source in credentials.values())
    assert "HYPHA_KEY_PEM=%d/key.pem" in unit.values_of("Environment")
    assert "key_pem" in COMPONENTS[component].model_fields
    # 2 is a configuration to correct: starting it again changes nothing
    assert "2" in service["RestartPreventExitStatus"].split()
    assert {"130", "143"} == set(service["SuccessExitStatus"].split())
    # cli/running.py cuts an end that takes longer than 4.5 s
    assert int(service["TimeoutStopSec"]) > 5


def test_a_worker_may_make_cgroups_and_use_gpus() -> None:
    service = _Unit(DEPLOY / "systemd" / "hypha-worker.service")["Service"]
    assert service["Delegate"] == "yes"
    assert service["OOMPolicy"] == "continue"
    assert "ProtectControlGroups" not in service
    assert "PrivateDevices" not in service

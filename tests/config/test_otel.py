"""Telemetry keys in every spelling, OpenTelemetry's variables over them, and what is wrong with either."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypha.config.models import GatewayConfig, SchedulerConfig
from hypha.config.otel import TelemetrySettings, resolve_telemetry
from hypha.config.reading.loading import Flag, load_config
from hypha.errors import ConfigError

BASE = """
cert_pem = "c"
key_pem = "k"
trust_pem = "t"
external_addresses = ["/ip4/192.0.2.1/tcp/1"]
"""
#: as operations.md has it, to be pasted
PASTED = """
telemetry_endpoint = "http://otel-collector:4318"
telemetry_protocol = "http/protobuf"
telemetry_sampler = "traceidratio"
telemetry_sample_ratio = 0.1

[telemetry_attributes]
"service.name" = "hypha-{component}"
"service.version" = "0.1.0"
"deployment.environment" = "production"

[telemetry_headers]
"Authorization" = "Bearer <api-token>"
"X-Scope-OrgID" = "<tenant-id>"
"""


def loaded(
    tmp_path: Path, text: str, environ: dict[str, str] | None = None, flags: tuple[Flag, ...] = ()
) -> GatewayConfig:
    path = tmp_path / "config.toml"
    path.write_text(BASE + text)
    return load_config(GatewayConfig, path, flags, environ or {})


def resolved(tmp_path: Path, text: str, environ: dict[str, str] | None = None) -> TelemetrySettings:
    return resolve_telemetry("hypha-gateway", loaded(tmp_path, text, environ), environ or {})


def test_off_by_default(tmp_path: Path) -> None:
    settings = resolved(tmp_path, "")
    assert not settings.on
    assert settings.trace_ratio is None


def test_the_specifications_example(tmp_path: Path) -> None:
    settings = resolved(tmp_path, PASTED)
    assert settings.on
    assert settings.traces is not None
    assert settings.traces.endpoint == "http://otel-collector:4318/v1/traces"
    assert settings.metrics is not None
    assert settings.metrics.endpoint == "http://otel-collector:4318/v1/metrics"
    assert settings.logs is not None
    # a capital letter in it would make gRPC send nothing at all
    assert settings.logs.headers == {"authorization": "Bearer <api-token>", "x-scope-orgid": "<tenant-id>"}
    assert settings.sampler == "traceidratio"
    assert settings.trace_ratio == 0.1
    assert settings.attributes["service.name"] == "hypha-gateway"
    assert settings.attributes["service.version"] == "0.1.0"
    assert settings.attributes["deployment.environment"] == "production"
    assert settings.of_instance("12D3KooWme").attributes["service.instance.id"] == "12D3KooWme"


def test_tables_may_be_text(tmp_path: Path) -> None:
    text = """
telemetry_endpoint = "http://c:4317/"
telemetry-protocol = "grpc"
telemetry_attributes = "deployment.environment=lab,team=a%2Cb"
telemetry_headers = "Authorization=Bearer%20sesame"
"""
    settings = resolved(tmp_path, text)
    assert settings.traces is not None
    assert settings.traces.endpoint == "http://c:4317"
    assert settings.traces.headers == {"authorization": "Bearer sesame"}
    assert settings.attributes["team"] == "a,b"


def test_opentelemetrys_variables_win_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    environ = {
        "HYPHA_TELEMETRY_ENDPOINT": "http://hypha:1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://otel:4317",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-scope-orgid=nine",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=staging,service.name=a",
        "OTEL_SERVICE_NAME": "mine",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.25",
        "OTEL_METRIC_EXPORT_INTERVAL": "5000",
    }
    settings = resolved(tmp_path, PASTED, environ)
    assert settings.traces is not None
    assert settings.traces.endpoint == "http://otel:4317"
    assert settings.traces.headers["x-scope-orgid"] == "nine"
    assert settings.traces.headers["authorization"] == "Bearer <api-token>"
    assert settings.attributes["deployment.environment"] == "staging"
    assert settings.attributes["service.name"] == "mine"
    assert (settings.sampler, settings.ratio) == ("parentbased_traceidratio", 0.25)
    assert settings.interval_s == 5
    flag = Flag("--set", "telemetry_endpoint", "http://flag:2")
    assert loaded(tmp_path, PASTED, environ, (flag,)).telemetry_endpoint == "http://flag:2"


def test_one_signal_may_go_elsewhere_or_nowhere(tmp_path: Path) -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "http://loki:3100/otlp/v1/logs",
        "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/json",
        "OTEL_EXPORTER_OTLP_LOGS_HEADERS": "a=b",
        "OTEL_METRICS_EXPORTER": "none",
    }
    settings = resolved(tmp_path, PASTED, environ)
    assert settings.metrics is None
    assert settings.logs is not None
    assert settings.logs.endpoint == "http://loki:3100/otlp/v1/logs"
    assert settings.logs.protocol == "http/json"
    assert settings.logs.headers["a"] == "b"
    assert settings.traces is not None
    assert settings.traces.protocol == "http/protobuf"
    alone = resolved(tmp_path, "", environ)
    assert alone.logs is not None
    assert alone.traces is None


def test_the_sdk_can_be_disabled(tmp_path: Path) -> None:
    assert not resolved(tmp_path, 'http_address = "127.0.0.1:0"' + PASTED, {"OTEL_SDK_DISABLED": "true"}).on


def test_a_scheduler_says_which_job_it_runs() -> None:
    job = {"name": "digits", "model": {"type": "auto"}, "dataset": {"dataset": "d"}, "output": "o"}
    config = SchedulerConfig.model_validate(
        {
            "cert_pem": "c", "key_pem": "k", "trust_pem": "t", "gateway_addresses": ["/ip4/192.0.2.1/tcp/1"],
            "scheduler": {"job": job},
        }
    )  # fmt: skip
    assert resolve_telemetry("hypha-scheduler", config, {}).attributes["hypha.job"] == "digits"


@pytest.mark.parametrize(
    ("text", "environ", "said"),
    [
        (
            'telemetry_endpoint = "collector:4318"',
            {},
            ("telemetry_endpoint", "http://host:port", "config.toml:6"),
        ),
        ('telemetry_protocol = "udp"', {}, ("telemetry_protocol", "http/json", "config.toml:6")),
        ("telemetry_sample_ratio = 2", {}, ("telemetry_sample_ratio", "config.toml:6")),
        ("", {"OTEL_TRACES_SAMPLER": "sometimes"}, ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")),
        ("", {"OTEL_TRACES_SAMPLER_ARG": "much"}, ("OTEL_TRACES_SAMPLER_ARG",)),
        ("", {"OTEL_METRIC_EXPORT_INTERVAL": "soon"}, ("OTEL_METRIC_EXPORT_INTERVAL",)),
        ("", {"OTEL_RESOURCE_ATTRIBUTES": "lab"}, ("OTEL_RESOURCE_ATTRIBUTES", "key=value")),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, text: str, environ: dict[str, str], said: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text, environ)
    for words in said:
        assert words in str(caught.value)


def test_a_wrong_header_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, 'telemetry_headers = "Bearer sesame"')
    assert "telemetry_headers" in str(caught.value)
    assert "sesame" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, PASTED, {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "sesame"})
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("name", ["ENDPOINT", "PROTOCOL"])
def test_a_signals_own_variable_may_be_wrong(tmp_path: Path, name: str) -> None:
    variable = f"OTEL_EXPORTER_OTLP_TRACES_{name}"
    with pytest.raises(ConfigError, match=variable):
        resolved(tmp_path, PASTED, {variable: "carrier pigeon"})

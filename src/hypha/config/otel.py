"""OpenTelemetry's own variables: those that say the same as a key of ours, and those of one signal alone.

:func:`otel_settings` gives the former as settings of a layer above the file and ``HYPHA_*``;
:func:`resolve_telemetry` decides from the configuration and the rest what is sent where, without looking
anywhere else. Everything it returns is passed on as arguments, which OpenTelemetry's SDK takes before its
variables. What is not named here (time-outs, compression, certificates, limits) the SDK reads by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args
from urllib.parse import urlsplit

from hypha import __version__
from hypha.config.models import NodeConfig, OtlpProtocol, Sampler, SchedulerConfig
from hypha.config.section import pairs_of
from hypha.errors import ConfigError, Problem

SIGNALS = ("traces", "metrics", "logs")
_DIRECT = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "telemetry_endpoint",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "telemetry_protocol",
    "OTEL_TRACES_SAMPLER": "telemetry_sampler",
    "OTEL_TRACES_SAMPLER_ARG": "telemetry_sample_ratio",
}
_TABLES = {
    "OTEL_EXPORTER_OTLP_HEADERS": "telemetry_headers",
    "OTEL_RESOURCE_ATTRIBUTES": "telemetry_attributes",
}


@dataclass(frozen=True)
class Signal:
    """Where one signal goes. ``endpoint`` is the whole URL; with grpc the server's."""

    endpoint: str = field(repr=False)
    protocol: OtlpProtocol
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class TelemetrySettings:
    """What is to be sent, by whom and where; ``None``: not sent. ``scraped``: metrics are asked for over
    local HTTP. ``ratio`` is what the ``traceidratio`` samplers take.
    """

    traces: Signal | None
    metrics: Signal | None
    logs: Signal | None
    scraped: bool
    sampler: Sampler
    ratio: float
    attributes: Mapping[str, str | int | float | bool]
    interval_s: float

    @property
    def on(self) -> bool:
        """Whether the SDK is needed at all."""
        return self.scraped or any((self.traces, self.metrics, self.logs))

    @property
    def trace_ratio(self) -> float | None:
        """The share of traces that begin here which is recorded; ``None``: this node records none."""
        if self.traces is None or self.sampler.endswith("always_off"):
            return None
        return self.ratio if self.sampler.endswith("traceidratio") else 1.0

    def of_instance(self, peer_id: str) -> TelemetrySettings:
        """The same with the node's PeerID, where no other name was given."""
        return replace(self, attributes={"service.instance.id": peer_id, **self.attributes})


def otel_settings(environ: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    """(variable, key, value) of those that set a key of ours. Tables are set entry by entry."""
    for name, key in _DIRECT.items():
        if text := environ.get(name):
            yield name, key, text
    for name, key in _TABLES.items():
        if text := environ.get(name):
            try:
                pairs = pairs_of(text)
            except ValueError:
                pairs = text  # validation names the variable
            yield name, key, pairs
    if service := environ.get("OTEL_SERVICE_NAME"):
        yield "OTEL_SERVICE_NAME", "telemetry_attributes", {"service.name": service}
    if text := environ.get("OTEL_METRIC_EXPORT_INTERVAL"):
        interval_ms = float(text) if text.strip().replace(".", "", 1).isdigit() else None
        value = text if interval_ms is None else interval_ms / 1000
        yield "OTEL_METRIC_EXPORT_INTERVAL", "telemetry_interval_s", value


def resolve_telemetry(component: str, config: NodeConfig, environ: Mapping[str, str]) -> TelemetrySettings:
    """What ``component`` (``hypha-worker``) is to send. Raises ConfigError for a variable that is wrong."""
    disabled = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    problems: list[Problem] = []
    traces, metrics, logs = (None if disabled else _signal(one, config, environ, problems) for one in SIGNALS)
    if problems:
        raise ConfigError(problems)
    ratio = config.telemetry_sample_ratio
    usual: Sampler = "parentbased_always_on" if ratio is None else "parentbased_traceidratio"
    attributes: dict[str, str | int | float | bool] = {
        "service.name": component,
        "service.version": __version__,
    }
    if isinstance(config, SchedulerConfig):
        attributes["hypha.job"] = config.scheduler.job.name
    name = component.removeprefix("hypha-")
    for key, value in config.telemetry_attributes.items():
        attributes[key] = value.replace("{component}", name) if isinstance(value, str) else value
    return TelemetrySettings(
        traces=traces,
        metrics=metrics,
        logs=logs,
        scraped=config.http_address is not None and not disabled and not _none("metrics", environ),
        sampler=config.telemetry_sampler or usual,
        ratio=1.0 if ratio is None else ratio,
        attributes=attributes,
        interval_s=config.telemetry_interval_s,
    )


def endpoint_problem(endpoint: str, protocol: str) -> str | None:
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if host and parts.scheme in ("http", "https") and not (protocol == "grpc" and parts.path.strip("/")):
        return None
    shown = shown_endpoint(endpoint)
    return f"it should be http://host:port, or https://host:port, for {protocol}, not {shown!r}"


def shown_endpoint(endpoint: str) -> str:
    """``endpoint`` without what may be a password in it."""
    scheme, separator, rest = endpoint.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _none(signal: str, environ: Mapping[str, str]) -> bool:
    return environ.get(f"OTEL_{signal.upper()}_EXPORTER", "").strip().lower() == "none"


def _signal(
    signal: str, config: NodeConfig, environ: Mapping[str, str], problems: list[Problem]
) -> Signal | None:
    if _none(signal, environ):
        return None
    prefix = f"OTEL_EXPORTER_OTLP_{signal.upper()}"
    protocol = environ.get(f"{prefix}_PROTOCOL") or config.telemetry_protocol
    if protocol not in get_args(OtlpProtocol):
        known = ", ".join(get_args(OtlpProtocol))
        problems.append(Problem("", f"{protocol} is no protocol; known are {known}", f"{prefix}_PROTOCOL"))
        return None
    try:
        own = pairs_of(environ.get(f"{prefix}_HEADERS", ""))
    except ValueError as exc:
        problems.append(Problem("", str(exc), f"{prefix}_HEADERS"))
        return None
    merged = {**config.telemetry_headers, **cast(dict[str, str], own)}
    # gRPC refuses to send a header with a capital letter, and HTTP takes them in any case
    headers = {name.lower(): value for name, value in merged.items()}
    if endpoint := environ.get(f"{prefix}_ENDPOINT"):
        if (wrong := endpoint_problem(endpoint, protocol)) is not None:
            problems.append(Problem("", wrong, f"{prefix}_ENDPOINT"))
            return None
    elif config.telemetry_endpoint is None:
        return None
    else:
        base = config.telemetry_endpoint.rstrip("/")
        endpoint = base if protocol == "grpc" else f"{base}/v1/{signal}"
    return Signal(endpoint, cast(OtlpProtocol, protocol), headers)

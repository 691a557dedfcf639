"""Metrics as Prometheus asks for them: text, over local HTTP (``/metrics``)."""

from __future__ import annotations

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


class Exposition:
    """``reader`` belongs to a meter provider; :meth:`write` is what it read, as text."""

    def __init__(self) -> None:
        # one of our own: libraries count in the default one
        self._registry = CollectorRegistry()
        self.reader = PrometheusMetricReader(scope_info_enabled=False, registry=self._registry)

    def write(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type, of the kind that the header ``accept`` asks for. Blocks for some
        milliseconds.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

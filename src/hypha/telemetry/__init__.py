"""How a node shows itself: structured logs (``logs``) and local HTTP (``http``, ``health``)."""

import hypha.telemetry.without  # noqa: F401  before Hypercorn
from hypha.telemetry.http.health import health_of
from hypha.telemetry.http.server import serve_http
from hypha.telemetry.logs import configure_logging

__all__ = ["configure_logging", "health_of", "serve_http"]

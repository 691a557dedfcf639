"""The status bridge of the Rust Hypha: ``POST <url>/status`` with one metric of one worker, as JSON. Its AIM
driver listens to that, and so can any small server.
"""

from __future__ import annotations

import httpx

from hypha.errors import HyphaError
from hypha.sinks.interface import Destination, RoundValues, RunInfo

_IDLE_S = 1.0
_TIMEOUT_S = 10


class StatusBridge:
    """Figures of the whole job are sent with the job's name as ``worker_id``."""

    def open(self, destination: Destination, run: RunInfo) -> None:
        """Nothing is sent yet."""
        headers = {"Authorization": f"Bearer {destination.token}"} if destination.token else {}
        self._url = f"{(destination.url or '').rstrip('/')}/status"
        self._job = destination.name
        # the bridge that was named, and no proxy of the environment. Rounds are further apart than servers
        # keep idle connections, mostly five seconds: one that is being closed would cost a figure
        limits = httpx.Limits(keepalive_expiry=_IDLE_S)
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_S, trust_env=False, limits=limits)

    def record(self, values: RoundValues) -> None:
        """Send one request for each figure, over one connection."""
        for worker, figures in ((self._job, values.values), *values.workers.items()):
            for name, value in figures.items():
                body = {"worker_id": worker, "round": values.round, "metric_name": name, "value": value}
                response = self._client.post(self._url, json=body)
                if not response.is_success:
                    raise HyphaError(f"the bridge answered {response.status_code} to {name}")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

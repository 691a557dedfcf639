"""How a node shows itself: metrics, logs, exporters, and local HTTP (``http/``).

- Signals are read off seams: what enters and leaves a node (``net/``), the journal of the machines
  (``scheduler/status/signals.py``, ``scheduler/status/round_traces.py``, ``scheduler/goodput/``), the bridge.
  No machine knows of them.
- Gauges: are read in the node's own thread, every few seconds and when somebody scrapes them
  (``telemetry/metrics.py``), never by an exporter's thread while the node changes.
- A round's trace: has identifiers that follow from job, generation and round, so that a worker that joins
  late, or a parameter server that was restored, is in it without having been told; the share that is sampled
  comes with the dispatch. A relayed advertisement is signed, so the gateway's span has an identifier that
  follows from the sender's and the gateway's PeerID.
- An executor's spans: go to its worker over the bridge (``POST /spans``: 256 a call, 2000 in ten seconds),
  which exports them: an executor has no collector, and no secret of one.
- A collector that is down: is reported once, by what exporters return; their own log lines are silent. Queues
  drop what is too much; the end of a process waits two seconds.
- Local HTTP: optional, ``http_address``: ``/health`` everywhere, ``/status`` at the scheduler; the bridge and
  it share a server that lets go of clients that have left (``telemetry/http/hypercorn.py``).
"""

from hypha.telemetry.health import health_of
from hypha.telemetry.http.server import serve_http
from hypha.telemetry.logs import configure_logging

__all__ = ["configure_logging", "health_of", "serve_http"]

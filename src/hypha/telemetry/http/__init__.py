"""Local HTTP of a node: ``/health``, ``/status``, ``/metrics`` and what a component adds."""

from hypha.processes.left_out import leave_out

# HTTP/2 and WebSockets, which are not spoken: before anything of Hypercorn is imported
leave_out("h2", "wsproto")

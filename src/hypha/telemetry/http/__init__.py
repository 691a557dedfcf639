"""Local HTTP of a node: ``/health``, ``/status``, ``/metrics`` and what a component adds."""

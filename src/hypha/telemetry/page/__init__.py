"""The live page: static files, one stream of server-sent events, and who may read them.

It knows nothing of jobs. A worker has a page of its own, ``worker.html``, which asks for its ``/leases`` and
``/health`` now and then. Whoever serves it says what viewers receive (:class:`PageFeed`) and what ``/status``
answers; the page's script reads the shapes of :mod:`hypha.scheduler.status.snapshot` and of
:mod:`hypha.scheduler.status.round_record`. It loads nothing from anywhere else, so it works
without the internet.

``assets/uPlot.*`` is uPlot 1.6.32, unchanged, under the licence beside it.
"""

from hypha.telemetry.page.serving import Message, PageFeed, page_routes, token_in, worker_routes

__all__ = ["Message", "PageFeed", "page_routes", "token_in", "worker_routes"]

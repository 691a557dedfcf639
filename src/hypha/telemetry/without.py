"""What of Hypercorn is never imported: HTTP/2 and WebSockets, which :mod:`hypha.telemetry.http.hypercorn`
does not speak. Comes before anything of Hypercorn.
"""

from __future__ import annotations

from hypha.left_out import leave_out

leave_out("h2", "wsproto")

"""``hypha doctor``: finds what keeps a node from working well, and how to mend it.

Observations are gathered first (``gathering/``: input and output, each within a bounded time), then judged
(``judging/``: pure functions from observations to findings). Every finding is of one of the checks in
``checks.py``, of which ``docs/troubleshooting.md`` is made; exit code 7 for warnings, 8 for errors. Of the
network ``net/peers/diagnosing.py`` answers; a gateway dials back only the caller's own address.
``HealthReport.time_s`` is the only wall-clock time on the wire.
"""

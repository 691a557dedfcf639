"""``hypha doctor``: finds what keeps a node from working well, and how to mend it.

Observations are gathered first (``gathering/``: input and output, each within a bounded time), then judged
(``judging/``: pure functions from observations to findings). Every finding is of one of the checks in
``checks.py``, of which ``docs/troubleshooting.md`` is made.

- The doctor: observations (``cli/doctor/gathering``) are judged by pure functions (``judging``),
  ``checks.py`` is the registry that ``docs/troubleshooting.md`` is made of; exit code 7 for warnings, 8 for
  errors. ``diagnosing.py`` answers it; a gateway dials back only the caller's own address.
  ``HealthReport.time_s`` is the only wall-clock time on the wire.
"""

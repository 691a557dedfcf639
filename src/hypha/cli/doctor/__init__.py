"""``hypha doctor``: finds what keeps a node from working well, and says how to mend it.

Facts are gathered first (``gathering/``: input and output, each within a bounded time), then judged
(``judging/``: pure functions from facts to findings). Every finding is of one of the checks in ``checks.py``,
of which ``docs/troubleshooting.md`` is made.
"""

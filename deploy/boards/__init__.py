"""What the dashboards show, one module a dashboard, each for one question.

:mod:`deploy.dashboards` makes Grafana's JSON of them.
"""

from __future__ import annotations

from deploy.boards.fleet import FLEET
from deploy.boards.job import JOB
from deploy.boards.network import NETWORK
from deploy.boards.overview import OVERVIEW

BOARDS = (OVERVIEW, JOB, NETWORK, FLEET)

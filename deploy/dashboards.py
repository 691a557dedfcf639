"""``python -m deploy.dashboards``: write Grafana's dashboards, deploy/dashboards/*.json.

What they show stands in deploy/boards/. Grafana's data source is a variable, so that the files can be
imported anywhere. The queries are checked by :mod:`deploy.lint`, and run on a Prometheus by the tests.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as models

from deploy.boards import BOARDS
from deploy.boards.panels import Board, Panel

PLACE = Path(__file__).parent / "dashboards"
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    made = _number() if panel.number else _graph(panel)
    made.title(panel.title).description(panel.note).unit(panel.unit).datasource(_SOURCE)
    for number, (query, legend) in enumerate([(panel.query, panel.legend), *panel.more]):
        target = prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + number))
        made.with_target(target.instant() if panel.number else target.range())
    return made


def _number() -> stat.Panel:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return stat.Panel().reduce_options(last).height(4).span(4)


def _graph(panel: Panel) -> timeseries.Panel:
    legend = (
        common.VizLegendOptions()
        .display_mode(looks.LegendDisplayMode.LIST)
        .placement(looks.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    tooltip = common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI)
    made = timeseries.Panel().legend(legend).tooltip(tooltip).height(8).span(8)
    if not panel.signed:
        made.min(0)
    if panel.stacked:
        made.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL)).fill_opacity(30)
    return made


def build(board: Board) -> str:
    """The dashboard's JSON, as Grafana imports it; the same for the same board."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"hypha-{board.name}")
        .description(board.description)
        .tags(["hypha"])
        .refresh("15s")
        .time("now-1h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
        .link(dashboard.DashboardLink("Hypha").tags(["hypha"]).as_dropdown(True).keep_time(True))
    )
    if board.of_job:
        made.with_variable(
            dashboard.QueryVariable("hypha_job")
            .label("Job")
            .datasource(_SOURCE)
            .query('label_values(target_info{job="hypha-scheduler"}, hypha_job)')
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    numbers = itertools.count(1)
    for title, panels in board.rows:
        made.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            made.with_panel(_panel(panel).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def main() -> int:
    """Write them all."""
    PLACE.mkdir(exist_ok=True)
    for board in BOARDS:
        (PLACE / f"{board.name}.json").write_text(build(board))
    return 0


if __name__ == "__main__":
    sys.exit(main())

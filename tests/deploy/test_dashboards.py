"""The dashboards that are committed are those that the generator writes, and Grafana's schema knows them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deploy.boards import BOARDS
from deploy.boards.panels import Board
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy import dashboards


def test_all_are_there_and_no_others() -> None:
    committed = {path.stem for path in dashboards.PLACE.glob("*.json")}
    assert committed == {board.name for board in BOARDS} == {"overview", "job", "network", "fleet"}


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_what_is_committed_is_what_the_generator_writes(board: Board) -> None:
    committed = (dashboards.PLACE / f"{board.name}.json").read_text()
    assert committed == dashboards.build(board), "run `python -m deploy.dashboards`"


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_schema_takes_every_field_and_gives_it_back(board: Board) -> None:
    """A field that the schema does not know is lost on the way."""
    raw = json.loads((dashboards.PLACE / f"{board.name}.json").read_text())
    again = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(raw)))
    assert again == raw


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_panels_do_not_lie_over_each_other_and_have_numbers_of_their_own(board: Board) -> None:
    panels: list[dict[str, Any]] = json.loads(dashboards.build(board))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_a_number_and_a_graph_ask_for_what_they_show() -> None:
    panels = json.loads(dashboards.build(BOARDS[0]))["panels"]
    modes = {panel["type"]: panel["targets"][0] for panel in panels if panel["type"] != "row"}
    assert modes["stat"]["instant"]
    assert modes["timeseries"]["range"]

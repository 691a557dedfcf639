"""The tables of the documentation are those of the registries, and the pages hold what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy import tables
from hypha.telemetry import instruments
from hypha.telemetry.metrics import Instrument
from hypha.tracing.operations import Operation

PAGE = tables.PAGE.read_text()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_table_is_on_its_page_once_and_up_to_date(page: Path) -> None:
    found = list(tables.sections(page.read_text()))
    assert sorted(name for name, _ in found) == sorted(tables.PAGES[page])
    for name, content in found:
        assert content == tables.TABLES[name](), f"{name} is out of date: run `python -m deploy.tables`"


def test_a_table_that_is_out_of_date_is_written_anew() -> None:
    stale = re.sub(r"\| `hypha_active_workers`.*\n", "", PAGE)
    assert stale != PAGE
    assert dict(tables.sections(stale))["metrics"] != tables.metrics()
    assert tables.rewrite(stale) == PAGE


def test_each_metric_operation_and_reason_has_a_row() -> None:
    rows = [line.split(" | ")[0].strip("|` ") for line in PAGE.splitlines() if line.startswith("| ")]
    for name in [
        *(one.prometheus_name for one in Instrument.declared.values()),
        *Operation.declared,
        *instruments.BADPUT_REASONS,
    ]:
        assert rows.count(name) == 1, name


@pytest.mark.parametrize(
    "query",
    [
        'sum(rate(hypha_lease_renewals_total{status="success"}[5m])) /\n'
        "sum(rate(hypha_lease_renewals_total[5m]))",
        "sum(rate(hypha_training_samples_total[5m]))",
        "histogram_quantile(0.95, rate(hypha_data_fetch_duration_bucket[5m]))",
        "hypha_active_workers",
        "sum(rate(hypha_network_bytes_sent_total[5m])) +\nsum(rate(hypha_network_bytes_received_total[5m]))",
    ],
)
def test_the_specifications_queries_are_on_the_page_word_for_word(query: str) -> None:
    assert re.search(rf"^```promql\n#.*\n{re.escape(query)}\n```$", PAGE, re.MULTILINE)


def test_every_key_that_tunes_says_what_it_is() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for table in (tables.tuning(), tables.elsewhere())
        for line in table.splitlines()[2:]
    ]
    assert len(rows) > 25
    assert [row[0] for row in rows if not row[-1].strip("| ")] == []
    # and what it may be
    assert [row[0] for row in rows if not row[-2]] == []

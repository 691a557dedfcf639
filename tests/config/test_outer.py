"""The outer optimizer where the configuration leaves it open, and what the page says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypha.config.job import OuterOptimizerConfig, outer_defaults, outer_values

PAGE = Path(__file__).parents[2] / "docs" / "defaults.md"


@pytest.mark.parametrize(
    ("rounds", "rate", "momentum"),
    [(1, 1.0, 0.0), (2, 1.0, 0.3), (5, 1.0, 0.5), (8, 1.0, 0.6), (50, 1.0, 0.6), (200, 1.0, 0.6)],
)
def test_what_is_chosen(rounds: int, rate: float, momentum: float) -> None:
    assert outer_defaults(rounds) == (rate, momentum)


def test_more_rounds_never_have_less_momentum() -> None:
    momenta = [outer_defaults(rounds)[1] for rounds in range(1, 2000)]
    assert momenta == sorted(momenta)


def test_what_is_set_stays_as_it_is() -> None:
    assert outer_values(OuterOptimizerConfig(learning_rate=0.3, momentum=0.1), 200) == (0.3, 0.1)
    assert outer_values(OuterOptimizerConfig(learning_rate=0.3), 50) == (0.3, 0.6)
    assert outer_values(OuterOptimizerConfig(momentum=0.0), 200) == (1.0, 0.0)


def test_the_pages_table_is_of_what_is_chosen() -> None:
    """Default and rounds of each row, as ``bench/outer_defaults.py`` wrote them."""
    rows = [
        line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if re.match(r"\| [a-z]+ \| \d", line)
    ]
    assert len(rows) == 36
    for _, rounds, _, _, _, default, ratio, _ in rows:
        found = re.fullmatch(r"[\d.]+ \(([\d.]+) / ([\d.]+)\)", default.strip())
        assert found is not None, default
        assert (float(found[1]), float(found[2])) == outer_defaults(int(rounds))
        assert float(ratio) <= 1.05


def test_the_page_says_from_which_number_of_rounds_each_is_chosen() -> None:
    """The page's list of momenta by rounds."""
    told = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE)
    numbers = range(1, 500)
    changes = [
        (one, *outer_defaults(one))
        for one in numbers
        if one == 1 or outer_defaults(one) != outer_defaults(one - 1)
    ]
    assert [(int(rounds), float(rate), float(momentum)) for rounds, rate, momentum in told] == changes

"""What a benchmark says: rows with a value, what it is measured against, the bound, and whether it holds.

Printed as a table, written to ``bench/results/<name>.json``; the exit code is 1 when a bound is missed.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"

_HOLDS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Bound:
    """``value`` (or the ratio, where there is a reference) ``sense`` ``limit``."""

    sense: Literal[">=", "<=", "<"]
    limit: float


@dataclass(frozen=True)
class Row:
    """One measurement. The bound is on ``value / reference`` if there is a reference, else on ``value``."""

    name: str
    value: float
    unit: str
    reference: float | None = None
    bound: Bound | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Value over reference."""
        return None if self.reference is None else self.value / self.reference

    @property
    def verdict(self) -> Literal["ok", "missed", "reported"]:
        """Whether the bound holds; ``reported`` where there is none."""
        if self.bound is None:
            return "reported"
        measured = self.value if self.ratio is None else self.ratio
        return "ok" if _HOLDS[self.bound.sense](measured, self.bound.limit) else "missed"


@dataclass
class Report:
    """Rows of the benchmark ``name``."""

    name: str
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """One more row."""
        self.rows.append(row)

    def finish(self) -> int:
        """Print, write, and give the exit code."""
        Console(width=120).print(self._table())
        RESULTS.mkdir(exist_ok=True)
        told = [asdict(row) | {"ratio": row.ratio, "verdict": row.verdict} for row in self.rows]
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps({"name": self.name, "rows": told}, indent=1) + "\n")
        return int(any(row.verdict == "missed" for row in self.rows))

    def _table(self) -> Table:
        table = Table(title=self.name, title_justify="left")
        for column in ("", "value", "reference", "ratio", "bound", "verdict", ""):
            table.add_column(column, justify="left" if not column else "right")
        for row in self.rows:
            colour = {"ok": "green", "missed": "bold red", "reported": "dim"}[row.verdict]
            table.add_row(
                row.name,
                f"{row.value:,.4g} {row.unit}",
                "" if row.reference is None else f"{row.reference:,.4g} {row.unit}",
                "" if row.ratio is None else f"{row.ratio:.3f}",
                "" if row.bound is None else f"{row.bound.sense} {row.bound.limit:g}",
                f"[{colour}]{row.verdict}[/]",
                row.note,
            )
        return table

"""One thing that is found, and how it shows columns and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypha.messages import Column

#: where the keys of a job stand
JOB = "scheduler.job"


@dataclass(frozen=True)
class PreflightFinding:
    """One line about ``key`` of the job's configuration. ``refutable``: a batch that passes the model proves
    that it is none.
    """

    key: str
    message: str
    error: bool = True
    refutable: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


def printable(finding: PreflightFinding) -> PreflightFinding:
    """The same on one line, with nothing that controls a terminal: peers choose the names of columns."""
    text = "".join(one if one.isprintable() else "\ufffd" for one in finding.message)
    return replace(finding, message=text)


def described(columns: Mapping[str, Column]) -> str:
    """Columns as people read them: ``labels I64, pixel_values F32 [1, 8, 8]``."""
    return ", ".join(
        f"{one.name} {one.dtype}" + (f" {list(one.shape)}" if one.shape else "")
        for one in sorted(columns.values(), key=lambda one: one.name)
    )


def number(value: float) -> str:
    """Whole numbers with all their digits; what a peer states need not be finite."""
    return f"{value:.0f}" if math.isfinite(value) and value == int(value) else f"{value:g}"

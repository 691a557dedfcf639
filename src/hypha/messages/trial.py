"""A batch that a scheduler has tried by a child process of its own before it leases anybody."""

from __future__ import annotations

from typing import Literal

from hypha.messages.data import Column, ColumnRange
from hypha.messages.jobs import TrainJob
from hypha.messages.values import Value


class Trial(Value):
    """Has a child process of the scheduler try a batch on the model of ``job`` before anybody is leased.

    ``model`` and ``preprocessor`` are directories with their files, where there are any; ``weights`` says
    whether the model's are among them. The batch has ``rows`` rows of ``columns``, with the smallest and the
    largest numbers of ``ranges``.
    """

    job: TrainJob
    model: str | None
    preprocessor: str | None
    weights: bool
    columns: tuple[Column, ...]
    ranges: tuple[ColumnRange, ...]
    rows: int


class TrialReport(Value):
    """What came of a :class:`Trial`. ``failed``: any worker would fail, because of ``reason``; ``unknown``:
    it could not be tried, because of ``reason``. ``shapes_only``: the model is too large to be built just for
    this, so it had no numbers. ``notes`` are sentences that the user should read.
    """

    outcome: Literal["passed", "failed", "unknown"]
    reason: str = ""
    parameters: int = 0
    shapes_only: bool = False
    notes: tuple[str, ...] = ()

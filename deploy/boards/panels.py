"""What a dashboard is made of, and how its queries are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: series of the job that is chosen
OF_JOB = 'and on (job, instance) target_info{hypha_job=~"$hypha_job"}'
#: over what counters are looked at
RATE = "[$__rate_interval]"
#: worker places: what is not badput there is training
WANTED = 'sum(hypha_scheduler_leases_wanted{kind="train"})'
WANTED_OF_JOB = f'sum(hypha_scheduler_leases_wanted{{kind="train"}} {OF_JOB})'


@dataclass(frozen=True)
class Panel:
    """A graph of ``query``, and of ``more``, each with its legend; with ``number`` what is so now."""

    title: str
    unit: str
    query: str
    legend: str = ""
    note: str = ""
    more: Sequence[tuple[str, str]] = ()
    number: bool = False
    stacked: bool = False
    #: what is shown may be below nought
    signed: bool = False


@dataclass(frozen=True)
class Board:
    """One dashboard: rows of panels, of which three stand beside each other, or six numbers."""

    name: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    of_job: bool = False


def rate(metric: str, by: str = "", of_job: bool = False) -> str:
    """The sum of a counter's rates, ``by`` labels."""
    inner = f"rate({metric}{RATE})" + (f" {OF_JOB}" if of_job else "")
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def quantile(share: float, histogram: str, by: str = "", of_job: bool = False) -> str:
    """That quantile of a histogram, ``by`` labels."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}" if by else "le", of_job)
    return f"histogram_quantile({share:g}, {buckets})"


def part(metric: str, matcher: str, by: str = "") -> str:
    """The share of a counter's events for which the matcher holds."""
    return f"{rate(f'{metric}{{{matcher}}}', by)} / {rate(metric, by)}"


def one_job(query: str) -> str:
    """A gauge of the job that is chosen."""
    return f"{query} {OF_JOB}"

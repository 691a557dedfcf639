"""``[limits]``: how much of its line a node may use, by the hour where it is wanted.

Megabits a second of 10^6 bits, of what the bulk plane sends and receives: slices, updates, theta,
checkpoints, models, and at a gateway what it relays. Leases, requests and gossip are not held up.
"""

from __future__ import annotations

import re
from datetime import time
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from hypha.config.section import Section

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
#: as ``datetime.weekday`` counts them
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MINUTES_A_DAY = 24 * 60


def _clock(value: object) -> object:
    """``HH:MM`` of text or of a TOML time. ValueError."""
    if isinstance(value, time):
        return f"{value.hour:02}:{value.minute:02}"
    if not isinstance(value, str):
        raise ValueError('a time of day such as "08:00"')
    match = re.fullmatch(r"(\d{1,2}):(\d{2})(?::00)?", value.strip())
    if match is None or minutes_of(found := f"{int(match[1]):02}:{match[2]}") > _MINUTES_A_DAY:
        raise ValueError('a time of day such as "08:00", up to "24:00"')
    if int(match[2]) > 59:
        raise ValueError('a time of day such as "08:00", up to "24:00"')
    return found


def minutes_of(clock: str) -> int:
    """Minutes since midnight of ``HH:MM``."""
    hours, _, minutes = clock.partition(":")
    return 60 * int(hours) + int(minutes)


Clock = Annotated[str, BeforeValidator(_clock)]


class HoursConfig(Section):
    """Other caps at certain hours. The first entry that holds now counts; what it does not set, and any other
    time, is as above.
    """

    start: Clock = Field(alias="from")
    """local time of this machine; an entry may run past midnight ("22:00" to "06:00")"""
    to: Clock
    days: list[Day] = []
    """mon, tue, wed, thu, fri, sat, sun; of an entry that runs past midnight, when it begins; none: every day
    """
    upload_mbit: float | None = Field(default=None, gt=0)
    download_mbit: float | None = Field(default=None, gt=0)

    def holds(self, weekday: int, minutes: float) -> bool:
        """Whether it does at so many minutes after midnight of a day (Monday is 0)."""
        start, to = minutes_of(self.start), minutes_of(self.to)
        if start < to:
            return start <= minutes < to and self._on(weekday)
        return (minutes >= start and self._on(weekday)) or (minutes < to and self._on((weekday - 1) % 7))

    def _on(self, weekday: int) -> bool:
        return not self.days or DAYS[weekday] in self.days


class LimitsConfig(Section):
    """What this node may use of its line, in megabits a second: of what bulk transfers send and receive, and
    at a gateway of what it relays. Leases, requests and gossip are not held up.
    """

    upload_mbit: float | None = Field(default=None, gt=0)
    """``None``: as much as goes"""
    download_mbit: float | None = Field(default=None, gt=0)
    schedule: list[HoursConfig] = []

    @property
    def caps_upload(self) -> bool:
        """Whether there is ever a cap on what is sent."""
        return self.upload_mbit is not None or any(one.upload_mbit is not None for one in self.schedule)

    @property
    def caps_download(self) -> bool:
        """Whether there is ever a cap on what is received."""
        return self.download_mbit is not None or any(one.download_mbit is not None for one in self.schedule)

    def at(self, weekday: int, minutes: float) -> tuple[float | None, float | None]:
        """The caps in force then (up, down; Mbit/s), Monday is 0; None: there is none."""
        for one in self.schedule:
            if one.holds(weekday, minutes):
                up = self.upload_mbit if one.upload_mbit is None else one.upload_mbit
                down = self.download_mbit if one.download_mbit is None else one.download_mbit
                return up, down
        return self.upload_mbit, self.download_mbit


class WorkerLimitsConfig(LimitsConfig):
    """What jobs may use of this machine, and this node of its line (megabits a second, of what bulk transfers
    send and receive; leases, requests and gossip are not held up).
    """

    shorthand: ClassVar[str | None] = "enforce"

    enforce: Literal["auto", "cgroup", "rlimit", "none"] = "auto"
    """how a job's resource limits are enforced; ``auto`` takes the strongest that works here"""
    max_processes: int | None = Field(default=None, ge=0)
    """processes and threads that one executor may have, 0: any number; ``None``: 512, or 64 for each core of
    its lease where that is more
    """

    @model_validator(mode="before")
    @classmethod
    def _enforcement_alone(cls, value: object) -> object:
        return {"enforce": value} if isinstance(value, str) else value

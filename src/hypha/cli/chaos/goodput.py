"""What a disturbed job is worth: goodput, and what each fault cost, from the rounds that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Applied:
    """A round that was seen to be applied; it may be discarded later."""

    at: float
    round: int


@dataclass(frozen=True)
class RoundSpan:
    """From the moment ``first`` was the open round to the moment ``stop`` was it."""

    began: float
    ended: float
    first: int
    stop: int

    @property
    def wall_s(self) -> float:
        """Its length."""
        return self.ended - self.began


def goodput(stretch: RoundSpan, samples: Mapping[int, int]) -> float:
    """Samples a second. ``samples`` are those of the rounds that count, by round; a round that is not in it
    adds nothing.
    """
    counted = sum(samples.get(number, 0) for number in range(stretch.first, stretch.stop))
    return counted / stretch.wall_s if stretch.wall_s > 0 else 0.0


def gaps(samples: Mapping[int, int], stop: int) -> list[int]:
    """Rounds before ``stop`` that should count and do not."""
    return [number for number in range(stop) if number not in samples]


def recovery_s(struck: float, applied: Sequence[Applied]) -> float | None:
    """From the fault to the next applied round; ``None`` when there was none."""
    return next((one.at - struck for one in applied if one.at > struck), None)


def costs_s(
    struck: Sequence[float], ended: float, applied: Sequence[Applied], samples: Mapping[int, int], calm: float
) -> list[float]:
    """What each fault cost, in seconds of undisturbed training at ``calm`` samples a second: what was not
    trained until the next fault struck, or until ``ended``. Below zero where more was.

    A round's samples were trained over the time since the round before it, so they are spread over it. Of
    a round that was applied again, the last time counts.
    """
    trained = _trained(applied, samples)
    costs = []
    for number, began in enumerate(struck):
        until = struck[number + 1] if number + 1 < len(struck) else ended
        done = sum(
            count * max(0.0, min(stop, until) - max(start, began)) / (stop - start)
            for start, stop, count in trained
        )
        costs.append(until - began - done / calm)
    return costs


def _trained(applied: Sequence[Applied], samples: Mapping[int, int]) -> list[tuple[float, float, int]]:
    """(from, to, samples) of each round that counts."""
    last = {one.round: number for number, one in enumerate(applied)}
    found = []
    for number, one in enumerate(applied):
        if number and last[one.round] == number and one.at > applied[number - 1].at:
            found.append((applied[number - 1].at, one.at, samples.get(one.round, 0)))
    return found

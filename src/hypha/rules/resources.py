"""Arithmetic on :class:`~hypha.messages.Resources`: what fits into what, what is left, what it is worth.

Amounts compare component by component, so two of them may be incomparable (more memory, fewer cores);
what is incomparable does **not** fit. Amounts that are not finite or are negative never fit anything
and are refused by every function that computes with them. Sums of decimal fractions are not exact in
floating point, so comparisons forgive :data:`TOLERANCE`, a billionth (one byte of a GB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from operator import attrgetter

from hypha.messages import Resources

#: Forgiven in comparisons: 0.3 - 0.1 - 0.1 must still have room for 0.1.
TOLERANCE = 1e-9

#: What a unit of each amount weighs when capacities are compared with a price.
WEIGHTS = Resources(gpu=25.0, cpu=1.0, memory=0.1, storage=0.01)

_NAMES = ("cpu", "memory", "gpu", "storage")
_amounts: Callable[[Resources], tuple[float, ...]] = attrgetter(*_NAMES)


def is_valid(resources: Resources) -> bool:
    """True when every amount is finite and not negative."""
    return all(math.isfinite(amount) and amount >= 0 for amount in _amounts(resources))


def check(resources: Resources, what: str) -> None:
    """Raise ValueError, naming ``what`` and the amount, unless :func:`is_valid`."""
    for name, amount in zip(_NAMES, _amounts(resources), strict=True):
        if not (math.isfinite(amount) and amount >= 0):
            raise ValueError(f"{what}: {name} = {amount} is not a finite amount >= 0")


def fits(needed: Resources, available: Resources) -> bool:
    """True when every amount of ``needed`` is there; False for incomparable and for invalid ones."""
    return (
        is_valid(needed)
        and is_valid(available)
        and all(
            need <= have + TOLERANCE for need, have in zip(_amounts(needed), _amounts(available), strict=True)
        )
    )


def add_up(parts: Iterable[Resources]) -> Resources:
    """The sum, each amount rounded once (so it does not depend on the order). ValueError if invalid."""
    listed = list(parts)
    for part in listed:
        check(part, "summand")
    return Resources(**{name: math.fsum(getattr(part, name) for part in listed) for name in _NAMES})


def left_of(total: Resources, used: Resources) -> Resources:
    """``total`` without ``used``. ValueError when ``used`` does not fit into ``total``."""
    if not fits(used, total):
        raise ValueError(f"{used} is more than {total}")
    return Resources(**{name: max(0.0, getattr(total, name) - getattr(used, name)) for name in _NAMES})


def weighted_capacity(resources: Resources) -> float:
    """25 gpu + 1 cpu + 0.1 memory + 0.01 storage: one number to hold against a price."""
    check(resources, "capacity")
    # plain sum: absurd amounts give infinity, where fsum would raise
    return sum(amount * weight for amount, weight in zip(_amounts(resources), _amounts(WEIGHTS), strict=True))


def batch_size(offered: Resources, required: Resources, maximum: int, default: int) -> int:
    """How many samples a batch has on a worker that offered ``offered``; ``maximum`` at most.

    ``required.gpu``, or without any ``required.memory``, is what one sample needs. A worker that offers room
    for two samples or more gets a batch of as many as fit. One that offers hardly more than it was asked for,
    as workers do by default, has not said what fits: its batch has ``default`` samples. So has any when
    neither is required.
    """
    if maximum < 1 or default < 1:
        raise ValueError(f"batches of {default}, of {maximum} at most: both must be at least 1")
    check(offered, "offered")
    check(required, "required")
    need, have = (required.gpu, offered.gpu) if required.gpu > 0 else (required.memory, offered.memory)
    # compared before dividing: a tiny requirement would overflow to infinity
    if need > 0 and have >= need * maximum:
        return maximum
    fitting = math.floor(have / need + TOLERANCE) if need > 0 else 0
    return min(maximum, fitting if fitting > 1 else default)

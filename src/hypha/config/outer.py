"""What the outer optimizer of a job is, where its configuration does not say: chosen by the number of rounds.

Momentum pays back over some 1 / (1 - momentum) rounds. A job of few rounds is over before that, and one of
hundreds gains by it; ``docs/defaults.md`` has the measurements. Momentum is 1 - sqrt(2 / rounds), in tenths,
0.9 at most; the learning rate is 1, and with 0.9 it is 0.7, which together is what DiLoCo was published with.
"""

from __future__ import annotations

import math

from hypha.config.models import OuterOptimizerConfig

#: for long jobs (Douillard et al. 2023)
LONG_LEARNING_RATE, LONG_MOMENTUM = 0.7, 0.9


def chosen(rounds: int) -> tuple[float, float]:
    """Learning rate and momentum for a job of ``rounds`` rounds of which nothing is set."""
    return outer_values(OuterOptimizerConfig(), rounds)


def outer_values(config: OuterOptimizerConfig, rounds: int) -> tuple[float, float]:
    """Learning rate and momentum of a job of ``rounds`` rounds: what is set stays as it is, and what is not
    is chosen; a learning rate for the momentum that there is.
    """
    momentum, rate = config.momentum, config.learning_rate
    if momentum is None:
        tenths = round(10 * (1.0 - math.sqrt(2.0 / max(2, rounds))))
        momentum = min(LONG_MOMENTUM, tenths / 10)
    if rate is None:
        rate = LONG_LEARNING_RATE if momentum >= LONG_MOMENTUM else 1.0
    return rate, momentum

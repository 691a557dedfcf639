"""What the outer optimizer of a job is, where its configuration does not say.

Learning rate 1 and momentum 0.6 are near the best that was measured, from 8 rounds to 200
(``docs/defaults.md``). A job of very few rounds is over before momentum pays back, which takes some
1 / (1 - momentum) rounds: it has less.
"""

from __future__ import annotations

from hypha.config.job import OuterOptimizerConfig

LEARNING_RATE, MOMENTUM = 1.0, 0.6
#: number of rounds -> the momentum of a job that has no more than these
FEW_ROUNDS = {1: 0.0, 3: 0.3, 5: 0.5}


def chosen(rounds: int) -> tuple[float, float]:
    """Learning rate and momentum for a job of ``rounds`` rounds of which nothing is set."""
    few = [momentum for most, momentum in FEW_ROUNDS.items() if rounds <= most]
    return LEARNING_RATE, few[0] if few else MOMENTUM


def outer_values(config: OuterOptimizerConfig, rounds: int) -> tuple[float, float]:
    """Learning rate and momentum of a job of ``rounds`` rounds: what is set stays as it is, and what is not
    is chosen.
    """
    rate, momentum = chosen(rounds)
    return (
        rate if config.learning_rate is None else config.learning_rate,
        momentum if config.momentum is None else config.momentum,
    )

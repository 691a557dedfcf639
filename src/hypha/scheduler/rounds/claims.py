"""What a worker states about itself is a claim: here are bounds of its times and losses. What an update may
stand for is in :mod:`hypha.rules.contributions`. Pure.
"""

from __future__ import annotations

import math

#: seconds a batch: no step of any model is quicker, and none that is awaited takes longer
LEAST_BATCH_S, MOST_BATCH_S = 1e-4, 1e7
#: a larger loss is as good as none
_MOST_LOSS = 1e15


def bounded_loss(loss: float, otherwise: float) -> float:
    """``loss``, or ``otherwise`` where it is no number that can be shown, added up or written as JSON."""
    return loss if math.isfinite(loss) and abs(loss) <= _MOST_LOSS else otherwise

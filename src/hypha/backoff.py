"""Pauses between attempts at something that fails: each is longer than the last, up to a limit.

Jitter keeps nodes that failed together from trying again together. It is drawn from
:func:`hypha.runtime.chance`, so that a simulated run depends on its seed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: for pauses that nobody else could make at the same time
NO_JITTER = (1.0, 1.0)


def pause_after(failures: int, first_s: float, longest_s: float = math.inf, growth: float = 2.0) -> float:
    """Seconds to wait when so many attempts have failed before the last one; without jitter, for machines
    that draw their own.
    """
    # the exponent is bounded so that a week of failures does not overflow
    return min(longest_s, first_s * growth ** min(failures, 30))


@dataclass
class Backoff:
    """The pauses of one thing that is tried. ``jitter`` are the smallest and the largest share of a pause
    that are really waited. ``failures`` counts the attempts since the last success.
    """

    first_s: float
    longest_s: float = math.inf
    growth: float = 2.0
    jitter: tuple[float, float] = (0.5, 1.0)
    failures: int = 0

    def next_s(self) -> float:
        """An attempt has failed: seconds to wait before the next one."""
        pause_s = pause_after(self.failures, self.first_s, self.longest_s, self.growth)
        self.failures += 1
        if self.jitter == NO_JITTER:
            return pause_s
        # not at the top: it imports trio, which an executor does not need
        from hypha.runtime import chance

        return pause_s * chance().uniform(*self.jitter)

    def reset(self) -> None:
        """An attempt has succeeded: the next pause is the first again."""
        self.failures = 0

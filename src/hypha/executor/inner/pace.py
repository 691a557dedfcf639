"""``HYPHA_STEP_S``, with which a machine plays a slower one: the least seconds that a batch takes."""

from __future__ import annotations

import math

from hypha.errors import ModelError


def least_step_s(text: str | None) -> float:
    """Of ``HYPHA_STEP_S``, in seconds; 0 without. Raises :class:`ModelError` for what is no time."""
    try:
        value = float(text or 0.0)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ModelError(
            f"HYPHA_STEP_S is the least seconds of a batch, not {text!r}; mend the executor's env"
        )
    return value

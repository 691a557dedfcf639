"""How long a batch takes at least."""

from __future__ import annotations

import pytest

from hypha.errors import ModelError
from hypha.executor.inner.loop import least_step_s


@pytest.mark.parametrize(("text", "seconds"), [("", 0.0), ("0", 0.0), ("0.25", 0.25), ("3", 3.0)])
def test_seconds(text: str, seconds: float) -> None:
    assert least_step_s(text) == seconds


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "1 s"])
def test_anything_else_is_told(text: str) -> None:
    with pytest.raises(ModelError, match="HYPHA_STEP_S is the least seconds of a batch"):
        least_step_s(text)

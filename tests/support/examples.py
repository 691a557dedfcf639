"""Property tests of two lengths: a few examples in the default tier, many in another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

FEW, MANY = 20, 100


def few_and_many(
    marking_many: pytest.MarkDecorator, **strategies: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As hypothesis's ``given`` for a test that takes seconds; ``@example`` goes below it. The longer one is
    of the tier that ``marking_many`` names.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize(
            "examples",
            [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=marking_many)],
        )
        def of_some_length(examples: int) -> None:
            length = settings(
                max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
            )
            length(given(**strategies)(test))()

        of_some_length.__name__, of_some_length.__doc__ = test.__name__, test.__doc__
        of_some_length.__module__ = test.__module__
        return of_some_length

    return decorate

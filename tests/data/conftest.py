"""Fixtures of the data room's tests."""

from tests.support.network import network
from tests.support.recorded import recorded

__all__ = ["network", "recorded"]

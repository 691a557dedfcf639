"""Fixtures of the data room's tests."""

from tests.support.network import network

__all__ = ["network"]

"""Fixtures of the network room's tests."""

from tests.support.network import network

__all__ = ["network"]

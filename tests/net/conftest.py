"""Fixtures of the network room's tests."""

from tests.support.network import network
from tests.support.signals import signals

__all__ = ["network", "signals"]

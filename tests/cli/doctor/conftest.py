"""Fixtures of the doctor's tests."""

from tests.support.network import network

__all__ = ["network"]

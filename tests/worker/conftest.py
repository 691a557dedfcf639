"""What a test's nodes say of themselves."""

from __future__ import annotations

from tests.support.signals import signals

__all__ = ["signals"]

"""What a test's nodes say of themselves."""

from __future__ import annotations

from tests.support.recorded import recorded

__all__ = ["recorded"]

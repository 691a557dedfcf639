"""The one door to the process environment: nothing else in Hypha reads ``os.environ``."""

from __future__ import annotations

import os
from collections.abc import Mapping


def process_environment() -> Mapping[str, str]:
    """A copy of this process's environment variables."""
    return dict(os.environ)


def variable(name: str, default: str | None = None) -> str | None:
    """One variable of this process's environment; ``default`` when it is unset or empty."""
    return os.environ.get(name) or default

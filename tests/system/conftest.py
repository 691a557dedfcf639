"""Whole networks of real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.system import System, leftovers, open_system


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    """An empty network in ``tmp_path``; nothing of it may run on after the test."""
    async with open_system(tmp_path) as opened:
        yield opened
    assert leftovers(tmp_path) == []

"""Whole networks of real processes in network namespaces of their own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support.namespaces import Lab, open_lab
from tests.support.system import System, leftovers, open_system


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Namespaces that are gone after the test, whatever becomes of it."""
    with open_lab() as opened:
        yield opened


@pytest.fixture
async def system(tmp_path: Path, lab: Lab) -> AsyncIterator[System]:
    """An empty network in ``tmp_path``, for nodes in ``lab``; nothing of it may run on after the test."""
    async with open_system(tmp_path) as opened:
        yield opened
    assert leftovers(tmp_path) == []

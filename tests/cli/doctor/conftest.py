"""Fixtures of the doctor's tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from tests.support.network import network

__all__ = ["network"]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command silences the process's logs: its findings say it better."""
    names = ("", "hypha", "libp2p")
    before = {name: logging.getLogger(name).level for name in names}
    handlers = logging.getLogger().handlers[:]
    yield
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = handlers
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)

"""What a test's nodes say of themselves, and the networks that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.network import Network
from tests.support.signals import signals
from tests.support.virtual_network import network

__all__ = ["network", "signals"]


@pytest.fixture
def real_network(tmp_path: Path) -> Network:
    """Nodes over sockets, in real time."""
    return Network(tmp_path / "pki")

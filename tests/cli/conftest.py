"""A small network's certificates, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypha.pki.authority import CaFiles, make_node, make_org, make_root

ROLES = {"gateway": "gateway", "worker": "worker", "data": "data", "scheduler": "scheduler"}


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<name>-cert.pem`` and so on for one node of each role."""
    directory = tmp_path_factory.mktemp("pki")
    root = make_root("Test", directory)
    organisation = make_org("Lab", CaFiles(root.cert, root.key), directory)
    ca = CaFiles(organisation.cert, organisation.key, organisation.trust)
    for name, role in ROLES.items():
        make_node(name, ca, directory, roles=[role])
    return directory


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same names under another root."""
    directory = tmp_path_factory.mktemp("strangers")
    root = make_root("Other", directory)
    organisation = make_org("Other Lab", CaFiles(root.cert, root.key), directory)
    make_node("worker", CaFiles(organisation.cert, organisation.key, organisation.trust), directory)
    return directory

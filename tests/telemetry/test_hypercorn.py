"""Which private parts of Hypercorn local HTTP overrides: why pyproject.toml names one version exactly.

Where a later version passes, raise the version there; the rest of ``test_http.py`` shows that it behaves.
"""

from __future__ import annotations

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path

import hypercorn.protocol
import hypercorn.trio.run
import pytest
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer

from hypha.telemetry.http.hypercorn import serve

ROOT = Path(__file__).parent.parent.parent


def test_the_version_that_is_overridden_is_the_one_that_is_required() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"hypercorn[trio]=={version('hypercorn')}" in required


def test_its_classes_are_replaced_where_it_looks_them_up() -> None:
    assert issubclass(hypercorn.trio.run.TCPServer, TCPServer)
    assert hypercorn.trio.run.TCPServer is not TCPServer
    assert "TCPServer," in inspect.getsource(hypercorn.trio.run.worker_serve)
    assert issubclass(hypercorn.protocol.H11Protocol, H11Protocol)
    assert hypercorn.protocol.H11Protocol is not H11Protocol
    assert "self.protocol = H11Protocol(" in inspect.getsource(ProtocolWrapper)
    assert serve is hypercorn.trio.serve


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (TCPServer, "run", []),
        (TCPServer, "_read_data", []),
        (TCPServer, "protocol_send", ["event"]),
        (H11Protocol, "_check_protocol", ["event"]),
        (H11Protocol, "_create_stream", ["request"]),
    ],
)
def test_its_methods_are_overridden_as_it_calls_them(owner: type, name: str, parameters: list[str]) -> None:
    method = getattr(owner, name)
    assert inspect.iscoroutinefunction(method)
    assert list(inspect.signature(method).parameters) == ["self", *parameters]
    assert f"self.{name}" in inspect.getsource(owner)


def test_a_connection_has_the_attributes_that_are_used() -> None:
    made = inspect.getsource(TCPServer.__init__)
    assert all(f"self.{name} = " in made for name in ("config", "idle_task", "send_lock", "stream"))
    assert "self.protocol = ProtocolWrapper(" in inspect.getsource(TCPServer.run)
    # what the override of ``_read_data`` stops after it: the task that waits for the next request
    assert "idle_task.restart" in inspect.getsource(TCPServer.run)

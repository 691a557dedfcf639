"""What a node does not use of libp2p is not imported, and says so when it is used."""

from __future__ import annotations

import subprocess
import sys

_PARTS = {"aioquic", "dns", "httpx", "requests", "trio_websocket", "zeroconf"}


def test_a_node_imports_no_quic_no_web_sockets_and_no_http_client() -> None:
    """A process of its own: here others have imported them."""
    program = "import sys, hypha.worker.node; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"libp2p", "multiaddr"} <= imported
    assert imported & _PARTS == set()


def test_what_is_not_there_can_be_caught_but_not_used() -> None:
    program = """
import hypha.net
from libp2p.transport.quic.connection import QUICConnection
try:
    raise ValueError
except QUICConnection:
    raise
except ValueError:
    QUICConnection("a", b=1).is_closed
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "RuntimeError: libp2p.transport.quic.connection.QUICConnection is not used by Hypha: "
        "see hypha.net.unused"
    )

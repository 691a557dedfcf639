"""What a node does not use of its libraries is not imported, and says so when it is used."""

from __future__ import annotations

import subprocess
import sys

_PARTS = {
    "Crypto",
    "aioquic",
    "cffi",
    "coincurve",
    "dns",
    "h2",
    "httpx",
    "requests",
    "trio_websocket",
    "wsproto",
    "zeroconf",
}


def test_a_node_imports_no_quic_no_web_sockets_and_no_http_client() -> None:
    """A process of its own: here others have imported them."""
    program = """
import sys, hypha.worker.node
there = [name for name, module in sys.modules.items() if getattr(module, "__file__", None)]
print(*{name.partition(".")[0] for name in there})
"""
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
        "hypha.processes.left_out.LeftOut: libp2p.transport.quic.connection.QUICConnection is not used by "
        "Hypha: see hypha.processes.left_out"
    )

"""The bulk plane: files go whole and verified from node to node, or not at all.

``transfers`` is its face. A transfer is offered (``sending``), its two ends meet (``rendezvous``), and what
is said then (``wire``) goes over a direct connection (``sockets``) or a libp2p stream (``streams``).
"""

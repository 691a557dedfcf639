"""What of libp2p is never imported: transports, ciphers and ways of discovery that Hypha does not use. It was
half of the processor time of importing libp2p, and 25 MB in every process. Comes before anything of libp2p.
"""

from __future__ import annotations

from hypha.processes.left_out import leave_out

leave_out(
    "libp2p.discovery.mdns",
    "libp2p.security.noise",
    "libp2p.security.secio",
    "libp2p.security.tls.autotls",
    "libp2p.transport.quic",
    "libp2p.transport.websocket",
    # names are resolved as the system does it (hosts file included): see ``dialing``
    "multiaddr.resolvers",
    # nodes have Ed25519 keys and no shared secret: RSA, and ciphers of older transports
    "Crypto",
    # secp256k1
    "coincurve",
)

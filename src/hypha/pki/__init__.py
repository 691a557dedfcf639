"""Who a node is: loading and checking its files (``identity``), making them (``authority``).

The key decides the PeerID, ordinary X.509 the trust: every CA of the trust bundle is an anchor, the node
presents its organisation's CA with its own certificate, no SAN is needed, roles are URI SANs
``urn:hypha:role:<role>``. Revocation lists are checked by us and not by OpenSSL's flags, which would refuse
everybody for a missing list; an expired list still revokes. Files are read again when they change and on
SIGHUP; files that cannot be used leave the old ones in force. A CA may be limited to roles
(``urn:hypha:may-issue:<role>``), which is checked on every path; a node's organisation is the one below the
trusted root, never the leaf's own word; a CA is no node.

Whether anybody is revoked is looked up at each handshake, whenever a file has changed (looked at every few
seconds) and once a minute (``net/peers/table.py``): connections and transfers of who is are cut, and leases
with them end on both sides.
"""

from hypha.pki.authority import (
    CaFiles,
    MadeFiles,
    describe,
    make_node,
    make_org,
    make_root,
    renew_node,
    revoke,
)
from hypha.pki.certificates import peer_id_of, presented_chain, roles_of
from hypha.pki.identity import Identity, IdentityFiles, load_identity

__all__ = [
    "CaFiles",
    "Identity",
    "IdentityFiles",
    "MadeFiles",
    "describe",
    "load_identity",
    "make_node",
    "make_org",
    "make_root",
    "peer_id_of",
    "presented_chain",
    "renew_node",
    "revoke",
    "roles_of",
]

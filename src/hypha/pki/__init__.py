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

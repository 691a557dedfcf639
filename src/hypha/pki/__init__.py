"""Who a node is: loading and checking its files (``identity``), making them (``authority``)."""

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

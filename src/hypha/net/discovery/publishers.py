"""Whose certificate allows to publish on a gossip topic (:data:`hypha.access.TOPICS`).

A message's signature proves its publisher's key. What that key may do is in its certificate: the one that
came with the message, or that of a connection with the publisher.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hypha.access import TOPICS, carries, may_act_as, named
from hypha.errors import IdentityError, PeerUnreachable
from hypha.messages import MAX_CERTIFICATES
from hypha.naming import shown
from hypha.net.peers.table import PeerTable
from hypha.pki.identity import Identity

logger = logging.getLogger(__name__)

#: Publishers of whom it was said that they are refused.
MAX_TOLD = 1024


class Publishers:
    """Judges publishers by ``identity``'s trust and by the connections of ``peers``."""

    def __init__(self, identity: Identity, require_roles: bool, peers: PeerTable) -> None:
        self._identity = identity
        self._require_roles = require_roles
        self._peers = peers
        self._told: dict[str, None] = {}

    @property
    def own_certificates(self) -> tuple[bytes, ...]:
        """What to send along with a message of one's own."""
        return self._identity.certificates[:MAX_CERTIFICATES]

    def are_known(self, publisher: str, certificates: Sequence[bytes]) -> bool:
        """Whether the roles of ``publisher`` are known: it sent its certificates, or is or was connected."""
        if certificates:
            return True
        try:
            self._peers.roles_of(publisher)
        except PeerUnreachable:
            return False
        return True

    def refused(self, topic: str, publisher: str, certificates: Sequence[bytes]) -> bool:
        """Whether what ``publisher`` has published and signed is to be dropped, which is logged once.

        Not where nothing is known of it: a gateway passes on what a scheduler of an older version has
        published at another gateway, and whoever acts on it asks first.
        """
        try:
            problem = self._problem(topic, publisher, certificates)
        except PeerUnreachable:
            return False
        if problem is None:
            return False
        level = logging.DEBUG if publisher in self._told else logging.WARNING
        self._told[publisher] = None
        if len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]
        logger.log(
            level,
            "Dropped what %s has published: %s.",
            shown(publisher),
            problem,
            extra={"peer_id": publisher},
        )
        return True

    def _problem(self, topic: str, publisher: str, certificates: Sequence[bytes]) -> str | None:
        if certificates:
            try:
                vouched = self._identity.check(certificates[0], certificates[1:])
            except IdentityError as exc:
                return exc.problems[0].message
            if vouched.peer_id != publisher:
                return "the certificate with it is of another peer"
            has = vouched.roles
        else:
            has = self._peers.roles_of(publisher)
        if not has and self._require_roles:
            return "its certificate carries no role, and one is required here"
        allowed = TOPICS[topic].by
        if not may_act_as(has, allowed):
            return f"{topic} is for {named(allowed)}, and its certificate carries {carries(has)}"
        return None

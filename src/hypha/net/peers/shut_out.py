"""Peers with which a node does not connect for a while, as one of the two refuses the other's certificate.

Nothing comes of dialling again before that has changed, however often something here wants to reach the peer.
The pause doubles each time, and is over at once when the node's own files have changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from hypha.backoff import pause_after
from hypha.errors import IdentityError, PeerUnreachable
from hypha.net.peers.refusals import CERTIFICATE, TurnedAway

FIRST_PAUSE_S = 1.0
#: of so many peers it is remembered; the oldest is forgotten first
MAX_REMEMBERED = 1000


@dataclass(frozen=True)
class _Pause:
    failure: str
    times: int
    until: float


class ShutOut:
    """Of one node; a pause takes ``longest_s`` at most."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._pauses: dict[str, _Pause] = {}

    def note(self, peer: str, failure: str) -> None:
        """``peer`` was dialled in vain; ``failure`` says why."""
        earlier = self._pauses.pop(peer, None)
        times = earlier.times + 1 if earlier else 0
        lasts_s = pause_after(times, FIRST_PAUSE_S, self._longest_s)
        self._pauses[peer] = _Pause(failure, times, trio.current_time() + lasts_s)
        while len(self._pauses) > MAX_REMEMBERED:
            del self._pauses[next(iter(self._pauses))]

    def check(self, peer: str) -> None:
        """Raises PeerUnreachable, as the last time, while the pause of ``peer`` lasts."""
        pause = self._pauses.get(peer)
        if pause is not None and trio.current_time() < pause.until:
            raise PeerUnreachable(peer, pause.failure)

    def forget(self, peer: str) -> None:
        """``peer`` is connected."""
        self._pauses.pop(peer, None)

    def clear(self) -> None:
        """The node's certificate, or what it trusts, is another now."""
        self._pauses.clear()


def is_of_certificate(root: BaseException) -> bool:
    """Whether ``root``, at the bottom of a failed dial, is that one refuses the other's certificate."""
    if isinstance(root, TurnedAway):
        return root.refusal.code == CERTIFICATE
    return isinstance(root, IdentityError)

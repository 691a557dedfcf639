"""Who a PeerID is, in words for people: the name that its certificate gives it, and the end of the PeerID.

:mod:`hypha.net` learns a name from every certificate that it has verified. There is one table a process, as a
name belongs to a key, whichever node of the process has met it, and as log lines are written for all of them.
Whoever reads logs or ``/status`` by machine finds the whole PeerID in a field of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: an X.509 common name has at most so many characters
MAX_NAME = 64
MAX_NAMES = 20_000
_TAIL = 8
#: The PeerID of an Ed25519 key. What stands after a slash is part of an address, which people copy.
_PEER_ID = re.compile(r"(?<![/\w])12D3KooW[1-9A-HJ-NP-Za-km-z]{44}(?!\w)")

_names: dict[str, str] = {}


def cleaned(name: str, most: int = MAX_NAME) -> str:
    """``name`` in one line of ``most`` characters at most, without any that control a terminal or change the
    direction of text.
    """
    visible = "".join(one if one.isprintable() else " " for one in name)
    return " ".join(visible.split())[:most].rstrip()


def legible(text: str) -> str:
    """``text``, its lines and all, without what controls a terminal or changes the direction of text."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text)


def learn(peer: str, name: str) -> None:
    """``peer`` has shown a verified certificate with ``name``; an empty one says nothing."""
    known = _names.pop(peer, "")
    if name := cleaned(name) or known:
        _names[peer] = name  # inserted again: whoever was not met for longest is forgotten first
        while len(_names) > MAX_NAMES:
            del _names[next(iter(_names))]


def name_of(peer: str) -> str:
    """The name in the certificate of ``peer``; empty where nobody in this process has met it."""
    return _names.get(peer, "")


def names_of(peers: Iterable[str]) -> dict[str, str]:
    """The names that are known of ``peers``, by PeerID."""
    return {peer: _names[peer] for peer in sorted(set(peers)) if peer in _names}


def shown(peer: str, name: str | None = None) -> str:
    """``worker-1 (…wTqXNUgL)``, or ``…wTqXNUgL`` where the name is not known; ``name`` is what another
    process knows.
    """
    name = name_of(peer) if name is None else cleaned(name)
    short = f"…{peer[-_TAIL:]}" if len(peer) > _TAIL else peer
    return f"{name} ({short})" if name else short


def named(text: str) -> str:
    """``text`` with :func:`shown` in place of each whole PeerID; addresses stay as they are."""
    return _PEER_ID.sub(lambda found: shown(found[0]), text)

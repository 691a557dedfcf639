"""Bounds on what a peer says of itself by identify: repairs to py-libp2p 0.8.1, applied once.

As shipped, an answer or a push of identify has up to a megabyte, and a thousand of its addresses are kept
beside those of earlier ones, after each was compared with all of them: a push stalls the event loop for
0.2 s, the next one for three times as long, and so on, and the memory grows. Here a message is as large as
what a node has to say, a few addresses and protocols of it are looked at, few addresses are kept of a peer,
and pushes are not served: nothing here needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from libp2p.host import basic_host
from libp2p.identity.identify_push.identify_push import ID_PUSH, update_peerstore_from_identify
from libp2p.peer.peerdata import PeerData
from libp2p.utils import varint

from hypha.net.peers.addresses import MAX_ADDRESSES

#: A key, some dozens of addresses twice (once signed), and thirty protocols have five thousand bytes.
MAX_IDENTIFY_BYTES = 32 << 10
MAX_PROTOCOLS = 128


def _add_addresses(data: Any, addresses: Sequence[Any]) -> None:
    """Keep those of ``addresses`` that are new, and of all of them the newest."""
    new = [one for one in addresses[:MAX_ADDRESSES] if one not in data.addrs]
    data.addrs = [*data.addrs, *new][-MAX_ADDRESSES:]


async def _update(store: Any, peer: Any, message: Any) -> None:
    # what is no message of the right length is read once more, however long
    del message.listen_addrs[MAX_ADDRESSES:]
    del message.protocols[MAX_PROTOCOLS:]
    await update_peerstore_from_identify(store, peer, message)


def install() -> None:
    """Replace the functions and the default; calling it again changes nothing."""
    PeerData.add_addrs = _add_addresses
    basic_host.update_peerstore_from_identify = _update
    varint.read_length_prefixed_protobuf.__defaults__ = (True, MAX_IDENTIFY_BYTES)


def stop_pushes(host: Any) -> None:
    """Do not serve identify's pushes at ``host``."""
    host.multiselect.remove_handler(ID_PUSH)

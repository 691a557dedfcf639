"""The libp2p host, made as Hypha needs it: one security transport, one muxer, no life of its own.

Agreeing on a stream's protocol takes one journey instead of two. The library's client (multistream-select
1.0.0) says which negotiation it speaks, waits for the answer, and then says which protocol it wants. The
other end needs no answer to go on: both are said at once here, as other implementations of libp2p do. Every
request opens a stream, so it is a journey less for each of them.

Repairs to py-libp2p 0.8.1, applied once:

- A peer sends the first words of a connection before it has shown any certificate. As shipped, a word that is
  no UTF-8 is an error that nobody expects and that ends the swarm; one that claims 2^60 bytes is waited for.
  Here both are what the library calls a failure to communicate.
- As shipped, an answer or a push of identify has up to a megabyte, and a thousand of its addresses are kept
  beside those of earlier ones, after each was compared with all of them: a push stalls the event loop for
  0.2 s, the next one for three times as long, and so on, and the memory grows. Here a message is as large as
  what a node has to say, a few addresses and protocols of it are looked at, few addresses are kept of a peer,
  and pushes are not served: nothing here needs them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import trio
from libp2p import new_host
from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.host import basic_host
from libp2p.identity.identify_push.identify_push import ID_PUSH, update_peerstore_from_identify
from libp2p.io.exceptions import IOException
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerdata import PeerData
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_client import (
    DEFAULT_NEGOTIATE_TIMEOUT,
    MULTISELECT_PROTOCOL_ID,
    MultiselectClient,
)
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.utils import encode_delim, varint
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from hypha.decoding import decode
from hypha.errors import Undecodable
from hypha.net.libp2p import yamux
from hypha.net.libp2p.mutual_tls import PROTOCOL_ID, MutualTls
from hypha.net.libp2p.shared_port import SharedPortTcp
from hypha.net.libp2p.streams import InboundStreams, contained
from hypha.net.libp2p.tls_connection import TlsConnection
from hypha.net.peers.addresses import MAX_ADDRESSES

#: A key, some dozens of addresses twice (once signed), and thirty protocols have five thousand bytes.
MAX_IDENTIFY_BYTES = 32 << 10
MAX_PROTOCOLS = 128
#: The longest word; the answer to ``ls`` names every protocol that a node speaks.
MAX_WORD_BYTES = 64 << 10


class _NoAutoConnector(AutoConnector):  # type: ignore[misc]
    """One that never starts: it would dial whomever identify ever told of, hundreds at a time."""

    async def start(self) -> None: ...

    def record_disconnect(self, peer_id: ID) -> None: ...


def make_host(security: MutualTls, port: SharedPortTcp, max_connections: int, identify: bool = False) -> Any:
    """A host that listens nowhere yet, with ``security`` as the only way in.

    With ``identify`` it asks every peer what it is and speaks, which only a DHT server needs to know;
    all of them answer.
    """
    yamux.install()
    _install_repairs()
    host = new_host(
        key_pair=security.key_pair,
        sec_opt={PROTOCOL_ID: security},
        muxer_preference="YAMUX",
        transports=[port],
        disable_identify_address_discovery=True,
        connection_config=ConnectionConfig(
            max_connections=max_connections,
            min_connections=0,
            low_watermark=0,
            high_watermark=max_connections,
            # two sides that dial each other at once may have one each; trimming could cut the used one
            max_connections_per_peer=8,
        ),
    )
    swarm = host.get_network()
    # our own limits apply; the library's would reset what it does not like instead of saying so
    swarm.set_resource_manager(None)
    # whatever a peer's stream does to the library is an error in a task of the swarm, which would end with it
    swarm.common_stream_handler = contained(swarm.common_stream_handler)
    # its places would be taken by whoever connects, certificate or not; ours are in ``arrivals``
    swarm._inbound_limiter = trio.CapacityLimiter(math.inf)
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm._select_connection = _passing_guests_over(swarm._select_connection)
    host.multiselect_client = EagerClient()
    host.multiselect = InboundStreams(host.multiselect)
    host.multiselect.remove_handler(ID_PUSH)
    if not identify:
        host._should_identify_peer = lambda peer_id: False
    swarm.auto_connector = _NoAutoConnector(swarm)
    return host


def _passing_guests_over(select: Callable[[list[Any], ID], Any]) -> Callable[[list[Any], ID], Any]:
    """``select``, which chooses the connection for a new stream, without those of guests while there is
    another: who looks on beside a node, with its certificate, is not to be asked in its place.
    """

    def select_node(connections: list[Any], peer_id: ID) -> Any:
        return select([one for one in connections if not _is_guest(one)] or connections, peer_id)

    return select_node


def _is_guest(connection: Any) -> bool:
    tls: TlsConnection = connection.muxed_conn.secured_conn
    return not tls.is_initiator and tls.instance is None


def quiet_library() -> None:
    """What the library logs is said by us in one line, or is no news."""
    logging.getLogger("libp2p").setLevel(logging.ERROR)
    logging.getLogger("libp2p.security").setLevel(logging.INFO)
    for name in ("host", "network", "network.auto_connector", "protocol_muxer", "stream_muxer", "transport"):
        logging.getLogger(f"libp2p.{name}").setLevel(logging.CRITICAL)


def _add_addresses(data: Any, addresses: Sequence[Any]) -> None:
    """Keep those of ``addresses`` that are new, and of all of them the newest."""
    new = [one for one in addresses[:MAX_ADDRESSES] if one not in data.addrs]
    data.addrs = [*data.addrs, *new][-MAX_ADDRESSES:]


async def _update(store: Any, peer: Any, message: Any) -> None:
    # what is no message of the right length is read once more, however long
    del message.listen_addrs[MAX_ADDRESSES:]
    del message.protocols[MAX_PROTOCOLS:]
    await update_peerstore_from_identify(store, peer, message)


def _install_repairs() -> None:
    """Replace what identify and multistream-select use; calling it again changes nothing."""
    PeerData.add_addrs = _add_addresses
    basic_host.update_peerstore_from_identify = _update
    varint.read_length_prefixed_protobuf.__defaults__ = (True, MAX_IDENTIFY_BYTES)
    MultiselectCommunicator.read = _read


async def _read(communicator: MultiselectCommunicator) -> str:
    try:
        data = await read_varint_prefixed_bytes_limited(communicator.read_writer, MAX_WORD_BYTES)
        if data[-1:] != b"\n":
            raise Undecodable("a word of multistream-select ends with a new line")
        word: str = decode(lambda text: text.decode(), data[:-1])
    except (ParseError, IOException, Undecodable) as exc:
        raise MultiselectCommunicatorError(f"the peer's word cannot be read: {exc}") from exc
    return word


class EagerClient(MultiselectClient):  # type: ignore[misc]
    """Where there is one protocol to choose from."""

    async def select_one_of(
        self,
        protocols: Sequence[TProtocol],
        communicator: IMultiselectCommunicator,
        negotiate_timeout: int = DEFAULT_NEGOTIATE_TIMEOUT,
    ) -> TProtocol:
        """``protocols[0]``, when the other end speaks it; else MultiselectClientError."""
        if len(protocols) != 1 or not isinstance(communicator, MultiselectCommunicator):
            return await super().select_one_of(protocols, communicator, negotiate_timeout)
        wanted = (MULTISELECT_PROTOCOL_ID, str(protocols[0]))
        with trio.move_on_after(negotiate_timeout):
            try:
                await communicator.read_writer.write(b"".join(encode_delim(word.encode()) for word in wanted))
                for word in wanted:
                    said = await communicator.read()
                    if said != word:
                        raise MultiselectClientError(f"the peer said {said!r} where {word} was due")
            except (MultiselectCommunicatorError, IOException, AssertionError, ValueError) as exc:
                raise MultiselectClientError(f"it broke off: {exc}") from exc
            return protocols[0]
        raise MultiselectClientError(f"no answer within {negotiate_timeout} s")

"""Agreeing on a stream's protocol in one journey instead of two.

The library's client (multistream-select 1.0.0) says which negotiation it speaks, waits for the answer, and
then says which protocol it wants. The other end needs no answer to go on: both are said at once here, as
other implementations of libp2p do. Every request opens a stream, so it is a journey less for each of them.

A peer sends the first words of a connection before it has shown any certificate. As shipped, a word that is
no UTF-8 is an error that nobody expects and that ends the swarm; one that claims 2^60 bytes is waited for.
Here both are what the library calls a failure to communicate.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import TProtocol
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IOException
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_client import (
    DEFAULT_NEGOTIATE_TIMEOUT,
    MULTISELECT_PROTOCOL_ID,
    MultiselectClient,
)
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.utils import encode_delim
from libp2p.utils.varint import read_varint_prefixed_bytes_limited

from hypha.decoding import decode
from hypha.errors import Undecodable

#: The longest word; the answer to ``ls`` names every protocol that a node speaks.
MAX_WORD_BYTES = 64 << 10


async def _read(communicator: MultiselectCommunicator) -> str:
    """The next word."""
    try:
        data = await read_varint_prefixed_bytes_limited(communicator.read_writer, MAX_WORD_BYTES)
        if data[-1:] != b"\n":
            raise Undecodable("a word of multistream-select ends with a new line")
        word: str = decode(lambda text: text.decode(), data[:-1])
    except (ParseError, IOException, Undecodable) as exc:
        raise MultiselectCommunicatorError(f"the peer's word cannot be read: {exc}") from exc
    return word


def install() -> None:
    """Replace how words are read; calling it again changes nothing."""
    MultiselectCommunicator.read = _read


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

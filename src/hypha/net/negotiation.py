"""Agreeing on a stream's protocol in one journey instead of two.

The library's client (multistream-select 1.0.0) says which negotiation it speaks, waits for the answer, and
then says which protocol it wants. The other end needs no answer to go on: both are said at once here, as
other implementations of libp2p do. Every request opens a stream, so it is a journey less for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio
from libp2p.abc import IMultiselectCommunicator
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect_client import (
    DEFAULT_NEGOTIATE_TIMEOUT,
    MULTISELECT_PROTOCOL_ID,
    MultiselectClient,
)
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.utils import encode_delim


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

"""The requests that a simulated node answers: by whom, and how many at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from hypha.access import REQUESTS, named
from hypha.errors import Refused
from hypha.messages import RefusedReply, RequestEnvelope, Response, ResponseEnvelope

if TYPE_CHECKING:
    from hypha.simulation.net.node import SimulatedNode

logger = logging.getLogger("hypha.simulation")

#: as in hypha.net.rpc
_MAX_INBOUND_PER_PEER, _OWN_PER_PEER, _MAX_SHARED = 16, 2, 64

_requests = msgspec.msgpack.Decoder(RequestEnvelope)

Handler = Callable[[str, Any], Awaitable[Response]]


class SimulatedAnswers:
    """Of one node."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._handlers: dict[type, Handler] = {}
        self._inbound: Counter[str] = Counter()
        self._shared = 0
        self._is_partner: Callable[[str], bool] = lambda peer: False

    def answer(self, kind: type[Any], handler: Handler) -> None:
        """Answer requests of ``kind``."""
        self._handlers[kind] = handler

    def prefer(self, is_partner: Callable[[str], bool]) -> None:
        """Keep places for requests of those peers of whom ``is_partner`` says so."""
        self._is_partner = is_partner

    async def serve(self, caller: str, payload: bytes) -> bytes:
        """The reply to a request that has arrived, in the process of this node."""
        return msgspec.msgpack.encode(ResponseEnvelope(body=await self._answer(caller, payload)))

    async def _answer(self, caller: str, payload: bytes) -> Response:
        shares = self._inbound[caller] >= _OWN_PER_PEER and not self._is_partner(caller)
        if self._inbound[caller] >= _MAX_INBOUND_PER_PEER or (shares and self._shared >= _MAX_SHARED):
            return RefusedReply(code="busy", reason="too many requests at once; try again later")
        request = _requests.decode(payload).body
        name = type(request).__name__
        handler = self._handlers.get(type(request))
        if handler is None:
            return RefusedReply(code="unsupported", reason=f"this component does not answer {name}")
        allowed = REQUESTS[type(request)].by
        if not self._node.may(caller, allowed):
            return RefusedReply(code="role", reason=f"{name} needs the role {named(allowed)}")
        self._inbound[caller] += 1
        self._shared += shares
        try:
            return await handler(caller, request)
        except Refused as exc:
            return RefusedReply(code=exc.code, reason=exc.reason)
        except Exception as exc:
            logger.exception("The handler of %s failed.", name)
            self._node.process.crashed(exc)
            return RefusedReply(code="internal", reason=f"{name} failed there; its log says more")
        finally:
            self._shared -= shares
            self._inbound[caller] -= 1
            if not self._inbound[caller]:
                del self._inbound[caller]

"""What is recorded of a transfer: at each end a span, how long it took, and the bytes that arrived.

The receiver's span is a child of the sender's, which is a child of whatever sends, or of the request that
asked for the file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import trio
from opentelemetry.trace import SpanKind, get_current_span

from hypha.errors import NetworkError, Refused
from hypha.messages import TransferMeta
from hypha.net.bulk.connections import BulkConnection
from hypha.net.bulk.inbound import Inbound
from hypha.net.bulk.wire import ConnectionBroken
from hypha.telemetry.instruments import TRANSFER_BYTES, TRANSFER_DURATION
from hypha.tracing import Attribute, event, failed, span
from hypha.tracing.operations import RECEIVE_FILE, SEND_FILE

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def sending(peer: str, meta: TransferMeta) -> Iterator[None]:
    """A file goes to ``peer`` meanwhile, all attempts together. Cancelled, it is counted nowhere."""
    began = trio.current_time()
    logger.debug("%s is to be sent, %d bytes.", meta.name, meta.size, extra={"peer_id": peer})
    with span(SEND_FILE, _attributes(peer, meta), kind=SpanKind.PRODUCER) as sent:
        try:
            yield
        except (NetworkError, OSError) as exc:
            sent.set_attribute("error.type", exc.code if isinstance(exc, Refused) else type(exc).__name__)
            _count(meta, "outbound", "failure", began)
            logger.debug("%s was not sent: %s", meta.name, exc, extra={"peer_id": peer})
            raise
        _count(meta, "outbound", "success", began)


@contextlib.contextmanager
def receiving(inbound: Inbound) -> Iterator[None]:
    """The transfer comes in meanwhile, from its offer on. Cancelled, it is counted nowhere."""
    began, meta = trio.current_time(), inbound.meta
    attributes = _attributes(inbound.caller, meta)
    with span(RECEIVE_FILE, attributes, kind=SpanKind.CONSUMER, parent=inbound.traceparent) as received:
        try:
            yield
        except ConnectionBroken:
            _count(meta, "inbound", "failure", began)
            raise
        if inbound.scope.cancelled_caught:
            return
        verdict = inbound.verdict
        _count(meta, "inbound", "success" if inbound.arrived else "failure", began)
        if not inbound.arrived:
            reason = f"{verdict.outcome}: {verdict.reason}" if verdict is not None else "it did not come"
            failed(received, reason)
            received.set_attribute("error.type", (verdict and (verdict.code or verdict.outcome)) or "lost")
            logger.debug("%s did not arrive: %s.", meta.name, reason, extra=inbound.log_fields)
            return
        logger.debug(
            "%s arrived, %d bytes in %.2f s (%s).",
            meta.name,
            meta.size,
            trio.current_time() - began,
            inbound.link.way if inbound.link is not None else "no connection",
            extra=inbound.log_fields,
        )


def note_link(link: BulkConnection, offset: int | None = None) -> None:
    """Note in the span of a transfer over which connection it goes, and what was there already."""
    found: dict[str, Attribute] = {
        "hypha.transfer.way": link.way,
        "hypha.transfer.kept": link.was_kept,
        "hypha.transfer.relayed": link.is_relayed,
    }
    get_current_span().set_attributes(found)
    kept = " that was kept" if link.was_kept else ""
    logger.debug("A file goes over a connection (%s)%s.", link.way, kept, extra={"peer_id": link.peer})
    event("connected", found if offset is None else {**found, "hypha.transfer.offset": offset})


def _attributes(peer: str, meta: TransferMeta) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "hypha.peer": peer,
        "hypha.transfer.kind": meta.kind,
        "hypha.transfer.bytes": meta.size,
    }
    if (stamp := meta.stamp) is not None:
        attributes["hypha.job"] = stamp.job_id
        attributes["hypha.job.generation"] = stamp.generation
        attributes["hypha.round"] = stamp.round
    return attributes


def _count(meta: TransferMeta, direction: str, status: str, began: float) -> None:
    TRANSFER_DURATION.record(trio.current_time() - began, kind=meta.kind, direction=direction, status=status)
    if status == "success":
        TRANSFER_BYTES.add(meta.size, kind=meta.kind, direction=direction)

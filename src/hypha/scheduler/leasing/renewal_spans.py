"""The spans of one lease: its acceptance, and each later renewal with all its attempts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from opentelemetry.trace import Span, Status, StatusCode, use_span

from hypha.tracing import failed, start_span
from hypha.tracing.operations import ACCEPT_OFFER, RENEW_LEASE


class RenewalSpans:
    """One span at a time, with ``attributes``. The first one accepts the offer that was received in the span
    ``offered_in``, a ``traceparent``; of a lease that is ``held`` already it is a renewal like the others.
    """

    def __init__(self, attributes: Mapping[str, str], offered_in: str | None, held: bool) -> None:
        self._attributes = attributes
        self._offered_in = offered_in
        self._operation = RENEW_LEASE if held else ACCEPT_OFFER
        self._span: Span | None = None

    def __enter__(self) -> RenewalSpans:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """An attempt goes on meanwhile; it is the first of a renewal, or one more."""
        if self._span is None:
            self._span = start_span(self._operation, self._attributes, parent=self._offered_in)
        with use_span(self._span, record_exception=False, set_status_on_exception=False):
            yield

    def failed(self, what: str, reason: str) -> None:
        """What became of the lease in a renewal that did not succeed: an event, and the span is an error."""
        if self._span is not None:
            self._span.add_event(what, {"hypha.reason": reason})
            failed(self._span, reason)

    def renewed(self) -> None:
        """The renewal is over; the next one has nothing to do with the offer."""
        if self._span is not None:
            self._span.set_status(Status(StatusCode.OK))
        self._end()
        self._operation, self._offered_in = RENEW_LEASE, None

    def _end(self) -> None:
        span, self._span = self._span, None
        if span is not None:
            span.end()

"""An executor's spans on their way to the worker's exporter: bounded, as an executor is anybody's program."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec
import trio

from hypha.errors import Refused
from hypha.messages import FinishedSpan, SpanAttribute

#: Exports spans as those of an executor; must not block.
EmitSpans = Callable[[Sequence[FinishedSpan]], None]

#: An executor of ours has a dozen spans a round; rounds of a tenth of a second would still pass.
WINDOW_S, SPANS_A_WINDOW = 10.0, 2000
#: the worker's own memory holds what a collector does not take
BYTES_A_WINDOW = 4_000_000


_TRACE, _SPAN = re.compile("(?!0*$)[0-9a-f]{32}"), re.compile("(?!0*$)[0-9a-f]{16}")


class ExecutorSpans:
    """Those of the executor of the job ``job_id``."""

    def __init__(self, emit: EmitSpans | None, job_id: str, secrets: Sequence[str] = ()) -> None:
        self._emit = emit
        self._job_id = job_id
        self._secrets = tuple(one for one in secrets if one)
        self._window_ends = 0.0
        self._left = self._bytes_left = 0

    def take(self, spans: Sequence[FinishedSpan]) -> None:
        """Export ``spans``, all or none, without the job's secrets. Raises Refused: ``unsupported`` where
        nothing is exported here, ``invalid``, and ``busy`` beyond :data:`SPANS_A_WINDOW` or
        :data:`BYTES_A_WINDOW`.
        """
        if self._emit is None:
            raise Refused("unsupported", "this worker exports no traces")
        for span in spans:
            known = _TRACE.fullmatch(span.trace_id) and _SPAN.fullmatch(span.span_id)
            if not known or not _SPAN.fullmatch(span.span_id if span.parent_id is None else span.parent_id):
                raise Refused("invalid", f"an identifier of span {span.name!r} is none in hex digits")
            if span.end_ns < span.start_ns:
                raise Refused("invalid", f"span {span.name!r} ends before it begins")
        now = trio.current_time()
        if now >= self._window_ends:
            self._window_ends, self._left = now + WINDOW_S, SPANS_A_WINDOW
            self._bytes_left = BYTES_A_WINDOW
        if len(spans) > self._left:
            raise Refused("busy", f"more than {SPANS_A_WINDOW} spans within {WINDOW_S:g} s")
        size = len(msgspec.json.encode(spans))
        if size > self._bytes_left:
            raise Refused("busy", f"spans of more than {BYTES_A_WINDOW} bytes within {WINDOW_S:g} s")
        self._left -= len(spans)
        self._bytes_left -= size
        self._emit([self._cleaned(span) for span in spans])

    def _cleaned(self, span: FinishedSpan) -> FinishedSpan:
        events = tuple(
            msgspec.structs.replace(event, attributes=self._told(event.attributes)) for event in span.events
        )
        return msgspec.structs.replace(
            span,
            error=self._without_secrets(span.error),
            attributes={**self._told(span.attributes), "hypha.job": self._job_id},
            events=events,
        )

    def _told(self, attributes: dict[str, SpanAttribute]) -> dict[str, SpanAttribute]:
        return {
            name: self._without_secrets(value) if isinstance(value, str) else value
            for name, value in attributes.items()
        }

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

"""An executor's spans on their way to the worker's exporter: bounded, as an executor is anybody's program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import hexdigits

import msgspec
import trio

from hypha.errors import Refused
from hypha.messages import MAX_SPANS_A_CALL, FinishedSpan, SpanAttribute

#: Exports spans as those of an executor; must not block.
EmitSpans = Callable[[Sequence[FinishedSpan]], None]

#: An executor of ours has a dozen spans a round; rounds of a tenth of a second would still pass.
WINDOW_S, SPANS_A_WINDOW = 10.0, 2000
#: the worker's own memory holds what a collector does not take
CHARACTERS_A_WINDOW = 4_000_000
MAX_NAME, MAX_TEXT = 128, 1024
MAX_ATTRIBUTES, MAX_EVENTS, MAX_LINKS = 32, 128, 32


class ExecutorSpans:
    """Those of the executor of the job ``job_id``."""

    def __init__(self, emit: EmitSpans | None, job_id: str, secrets: Sequence[str] = ()) -> None:
        self._emit = emit
        self._job_id = job_id
        self._secrets = tuple(one for one in secrets if one)
        self._window_ends = 0.0
        self._left = self._characters_left = 0

    def take(self, spans: Sequence[FinishedSpan]) -> None:
        """Export ``spans``, all or none, without the job's secrets. Raises Refused: ``unsupported`` where
        nothing is exported here, ``too-large``, ``invalid``, and ``busy`` beyond :data:`SPANS_A_WINDOW` or
        :data:`CHARACTERS_A_WINDOW`.
        """
        if self._emit is None:
            raise Refused("unsupported", "this worker exports no traces")
        if len(spans) > MAX_SPANS_A_CALL:
            raise Refused("too-large", f"{len(spans)} spans; a call has at most {MAX_SPANS_A_CALL}")
        for span in spans:
            if (problem := _problem(span)) is not None:
                raise Refused("invalid", f"span {span.name[:MAX_NAME]!r}: {problem}")
        now = trio.current_time()
        if now >= self._window_ends:
            self._window_ends, self._left = now + WINDOW_S, SPANS_A_WINDOW
            self._characters_left = CHARACTERS_A_WINDOW
        if len(spans) > self._left:
            raise Refused("busy", f"more than {SPANS_A_WINDOW} spans within {WINDOW_S:g} s")
        characters = sum(_characters(span) for span in spans)
        if characters > self._characters_left:
            text = f"spans of more than {CHARACTERS_A_WINDOW} characters within {WINDOW_S:g} s"
            raise Refused("busy", text)
        self._left -= len(spans)
        self._characters_left -= characters
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


def _characters(span: FinishedSpan) -> int:
    attributes = [span.attributes, *(event.attributes for event in span.events)]
    texts = (
        len(name) + (len(value) if isinstance(value, str) else 8)
        for one in attributes
        for name, value in one.items()
    )
    return len(span.name) + len(span.error) + sum(len(event.name) for event in span.events) + sum(texts)


def _problem(span: FinishedSpan) -> str | None:
    """Why ``span`` cannot be exported."""
    identifiers = [(span.trace_id, 32), (span.span_id, 16)]
    if span.parent_id is not None:
        identifiers.append((span.parent_id, 16))
    for text, length in identifiers:
        if len(text) != length or not set(text) <= set(hexdigits.lower()) or set(text) == {"0"}:
            return f"{text[:64]!r} is no identifier of {length} hex digits"
    if not span.name or len(span.name) > MAX_NAME or len(span.error) > MAX_TEXT:
        return "its name or error is too long, or empty"
    if not 0 <= span.start_ns <= span.end_ns < 1 << 63:
        return "it ends before it begins"
    if len(span.events) > MAX_EVENTS or len(span.links) > MAX_LINKS:
        return f"it has more than {MAX_EVENTS} events or {MAX_LINKS} links"
    if any(len(event.name) > MAX_NAME or not 0 <= event.time_ns < 1 << 63 for event in span.events):
        return "an event's name is too long, or its time is none"
    if any(len(link) > MAX_NAME for link in span.links):
        return "a link is too long"
    attributes = [span.attributes, *(event.attributes for event in span.events)]
    if not all(_fits(one) for one in attributes):
        return f"more than {MAX_ATTRIBUTES} attributes, or longer ones than {MAX_TEXT} characters"
    return None


def _fits(attributes: dict[str, SpanAttribute]) -> bool:
    return len(attributes) <= MAX_ATTRIBUTES and all(
        len(name) <= MAX_NAME
        and not (isinstance(value, str) and len(value) > MAX_TEXT)
        # OTLP has integers of 64 bits
        and not (isinstance(value, int) and not -(1 << 63) <= value < 1 << 63)
        for name, value in attributes.items()
    )

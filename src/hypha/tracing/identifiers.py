"""W3C trace context, and the traces that several processes agree on without asking each other.

A round of a job is one trace. Workers train, the parameter server sums and the scheduler plans at the same
time, and who joins late has not heard where the trace began: so its identifiers follow from the job, its
generation and the round. Whether it is recorded is decided like anywhere else, by a share of all traces
(OpenTelemetry's ``TraceIdRatioBased``: of the lower 64 bits of the trace's identifier), which the scheduler
names when it dispatches.
"""

from __future__ import annotations

from hashlib import blake2b

_SPAN_BYTES = 8
_TRACE_BYTES = 16


def round_traceparent(job_id: str, generation: int, round_: int, ratio: float) -> str:
    """The ``traceparent`` of the span of a whole round; ``ratio`` of all rounds is sampled."""
    trace, span = _digest(f"{job_id}/{generation}/{round_}", _TRACE_BYTES), "round"
    ratio = min(1.0, ratio)
    sampled = (int.from_bytes(trace[_SPAN_BYTES:]) < round(ratio * (1 << 64))) if ratio > 0 else False
    return _written(trace, _digest(f"{job_id}/{generation}/{round_}/{span}", _SPAN_BYTES), sampled)


def hop_traceparent(parent: str, peer: str) -> str:
    """The ``traceparent`` of what ``peer`` did as it passed on a message whose sender's was ``parent``.

    A relayed message is signed, so who passes it on cannot write itself into it; who receives it from there
    knows all the same what the span there is called.
    """
    version, trace, span, flags = parent.split("-")
    return "-".join((version, trace, _digest(f"{span}/{peer}", _SPAN_BYTES).hex(), flags))


def _digest(text: str, size: int) -> bytes:
    found = blake2b(text.encode(), digest_size=size).digest()
    # all zero is no identifier
    return found if any(found) else b"\x01" * size


def _written(trace: bytes, span: bytes, sampled: bool) -> str:
    return f"00-{trace.hex()}-{span.hex()}-{'01' if sampled else '00'}"

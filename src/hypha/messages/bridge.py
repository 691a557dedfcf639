"""Between a worker and the processes under it: the bridge of an executor (JSON over a Unix socket), and an
executor host (MessagePack over one, a message a packet).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from hypha.messages.data import SliceAssigned
from hypha.messages.events import Event
from hypha.messages.jobs import Reference
from hypha.messages.transfers import TransferMeta
from hypha.messages.values import Message, Value


class FetchCall(Value):
    """POST /resources/fetch -> list of :class:`FetchedFile`."""

    resource: Reference


class FetchedFile(Value):
    """A file in the job directory; ``path`` is relative to it. ``slice``: set for dataset slices, and
    ``generation``, ``round`` and ``attempt`` then are those under which the slice was asked for: who starts
    over with theta of a generation, round and attempt drops its slices of earlier ones, no others.
    """

    path: str
    size: int
    slice: SliceAssigned | None = None
    round: int = 0
    attempt: int = 0
    generation: int = 0


class SendCall(Value):
    """POST /resources/send -> :class:`Sent`, once it is decided for every receiver; an error only when
    nobody acknowledged.

    A directory goes to a ``Local`` place only, where it is complete with its file ``marker``; with ``keep``
    so many complete ones of its siblings whose names are numbers stay, and older ones are deleted.
    ``blake3`` and ``xxh3`` (hex) spare the worker the hashing, where the executor knows them; see
    :class:`TransferMeta`.
    ``generation`` is that of the job's generation in which the file was made; ``None``: the present one.
    ``name`` is what the receiver is to call it, a relative path; else it is the last part of ``path``.
    """

    resource: Reference
    path: str
    round: int
    samples: int = 0
    contributors: tuple[str, ...] = ()
    marker: str = ""
    keep: int | None = None
    blake3: str = ""
    attempt: int = 0
    generation: int | None = None
    xxh3: str = ""
    name: str = ""


class Delivery(Value):
    """What became of a file at one receiver. ``error``: a refusal code, or ``unreachable``."""

    peer: str
    acknowledged: bool
    error: str = ""
    detail: str = ""


class Sent(Value):
    """One entry a receiver; at least one acknowledged."""

    deliveries: tuple[Delivery, ...]


class ReceiveCall(Value):
    """POST /resources/receive -> SSE of :class:`ReceivedFile`, for files of ``kinds``, of
    senders whom the job's scheduler named.
    """

    kinds: tuple[str, ...]


class ReceivedFile(Value):
    """A file that arrived whole and verified. The executor deletes it when it is done with it."""

    path: str
    size: int
    from_peer: str
    meta: TransferMeta


class StatusCall(Value):
    """POST /status/send: one event; ``Progress`` may be dropped for a newer one, others never are."""

    event: Event


#: Spans in one call; an executor posts the rest in the next one.
MAX_SPANS_A_CALL = 256
SpanName = Annotated[str, Meta(max_length=128)]
SpanText = Annotated[str, Meta(max_length=1024)]
#: nanoseconds since 1970, as OpenTelemetry has them
SpanTime = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]

#: What an attribute of a span may be: OTLP has integers of 64 bits.
SpanAttribute = bool | Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | float | SpanText
SpanAttributes = Annotated[dict[SpanName, SpanAttribute], Meta(max_length=32)]


class SpanEvent(Value):
    """Something that happened during a span."""

    name: SpanName
    time_ns: SpanTime
    attributes: SpanAttributes = {}


class FinishedSpan(Value):
    """A span that has ended, as an executor hands it to its worker. Identifiers are lower-case hex: 32 digits
    of the trace, 16 of a span. ``links`` are traceparents. ``error`` says what went wrong, where it did.
    """

    name: Annotated[SpanName, Meta(min_length=1)]
    trace_id: str
    span_id: str
    start_ns: SpanTime
    end_ns: SpanTime
    parent_id: str | None = None
    kind: Literal["internal", "client", "server", "producer", "consumer"] = "internal"
    status: Literal["unset", "ok", "error"] = "unset"
    error: SpanText = ""
    attributes: SpanAttributes = {}
    events: Annotated[tuple[SpanEvent, ...], Meta(max_length=128)] = ()
    links: Annotated[tuple[SpanName, ...], Meta(max_length=32)] = ()


class SpansCall(Value):
    """POST /spans: spans that the worker exports for its executor. Too many in a while are ``busy``, which is
    not worth a repetition.
    """

    spans: Annotated[tuple[FinishedSpan, ...], Meta(max_length=MAX_SPANS_A_CALL)]


class BridgeError(Value):
    """Body of every 4xx and 5xx answer of the bridge."""

    error: str
    detail: str


class ForkRequest(Value):
    """Fork an executor that runs ``main`` of ``module`` with ``arguments`` in ``directory``. With it go three
    descriptors: where it is answered, the lifeline of the executor's keeper, and where output goes.

    ``python``, ``package`` and ``inherited`` are the worker's own interpreter, installation and limits: a
    host with other ones would make another executor than the worker itself.
    """

    module: str
    arguments: tuple[str, ...]
    directory: str
    environment: dict[str, str]
    python: str
    package: str
    inherited: dict[str, str]
    #: as :class:`hypha.processes.keeper.Confinement` takes them
    keeper_options: tuple[str, ...] = ()
    #: the host need not have imported transformers and accelerate yet
    torch_only: bool = False


class Forked(Message):
    """The keeper runs; it leads a session and a process group of its own."""

    pid: int


class NotForked(Message):
    """The worker has to start this executor itself."""

    reason: str


class KeeperEnded(Message):
    """Nothing of the executor is left; ``status`` is its wait status. One that was killed says nothing."""

    status: int


ForkReply = Forked | NotForked | KeeperEnded

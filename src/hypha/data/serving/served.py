"""What a data node shows of the slices it serves: a span, a count, bytes and a duration of each.

A slice is being served from the request for it until its receiver has acknowledged it, or it was given up.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio
from opentelemetry.trace import Span

from hypha.errors import Refused
from hypha.messages import PullFile, TransferMeta
from hypha.telemetry.instruments import SERVE_DURATION, SERVED_BYTES, SLICE_REQUESTS
from hypha.telemetry.metrics import OTHER
from hypha.tracing import failed, start_span
from hypha.tracing.operations import SERVE_SLICE
from hypha.tracing.spans import Attribute

logger = logging.getLogger("hypha.data")

#: (caller, what it asks for) -> the file; raises Refused
Provide = Callable[[str, PullFile], Awaitable[tuple[Path, TransferMeta]]]


@dataclass(frozen=True)
class _Serving:
    span: Span
    dataset: str
    size: int
    began: float


class ServedSlices:
    """Around ``provide``, which gives slices ``<dataset>/<index>`` of ``datasets``."""

    def __init__(self, provide: Provide, datasets: frozenset[str]) -> None:
        self._provide = provide
        self._datasets = datasets
        #: by who pulls, and the token of its request
        self._serving: dict[tuple[str, str], _Serving] = {}

    @property
    def active(self) -> int:
        """Slices that are being served."""
        return len(self._serving)

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        """The file of a slice, in the span of the request for it. Raises Refused."""
        began = trio.current_time()
        name, _, number = request.name.rpartition("/")
        dataset = name if name in self._datasets else OTHER
        attributes: dict[str, Attribute] = {"hypha.peer": caller, "hypha.dataset": name}
        if number.isascii() and number.isdigit() and len(number) <= 9:
            attributes["hypha.slice"] = int(number)
        span = start_span(SERVE_SLICE, attributes)
        try:
            path, meta = await self._provide(caller, request)
        except BaseException as exc:
            if isinstance(exc, Refused):
                SLICE_REQUESTS.add(dataset=dataset, status="failure")
                failed(span, str(exc))
            span.end()
            raise
        span.set_attribute("hypha.transfer.bytes", meta.size)
        self._serving[caller, request.token] = _Serving(span, dataset, meta.size, began)
        return path, meta

    def served(self, caller: str, request: PullFile, error: Exception | None) -> None:
        """It is over: the receiver has the slice, unless there is an ``error``."""
        serving = self._serving.pop((caller, request.token), None)
        if serving is None:
            return
        SLICE_REQUESTS.add(dataset=serving.dataset, status="success" if error is None else "failure")
        lasted_s = trio.current_time() - serving.began
        logger.debug(
            "Slice %s was %s within %.3f s: %d bytes.",
            request.name,
            "served" if error is None else "not served",
            lasted_s,
            serving.size,
            extra={"peer_id": caller, "dataset": serving.dataset, "job_id": request.job_id},
        )
        if error is None:
            SERVED_BYTES.add(serving.size, dataset=serving.dataset)
            SERVE_DURATION.record(lasted_s, dataset=serving.dataset)
        else:
            failed(serving.span, str(error))
        serving.span.end()

"""The scheduler's front desk: what workers ask and tell, checked and handed to the round machine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import get_args

import trio

from hypha.errors import Refused
from hypha.messages import Acknowledged, ExecutorClass, NextSlice, NoSlice, Report, ReportEvent, SliceAssigned
from hypha.node import Node
from hypha.scheduler.data.datasets import ServedDataset
from hypha.scheduler.rounds.events import AnswerSlice, Disregarded, Input, Reported, SliceAsked, Told
from hypha.scheduler.rounds.policy import Start

#: events of one process whose numbers are remembered
_REMEMBERED = 1024
#: processes whose events are remembered
_PROCESSES = 1024
_RETRY_S = 0.2


class Seen:
    """Which numbered events of which process were handled already."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, str, str], OrderedDict[int, None]] = OrderedDict()

    def first_time(self, process: tuple[str, str, str], seq: int) -> bool:
        """True once for each ``seq`` of ``process``."""
        numbers = self._seen.setdefault(process, OrderedDict())
        self._seen.move_to_end(process)
        if len(self._seen) > _PROCESSES:
            self._seen.popitem(last=False)
        if seq in numbers or (len(numbers) == _REMEMBERED and seq < next(iter(numbers))):
            return False
        numbers[seq] = None
        if len(numbers) > _REMEMBERED:
            numbers.popitem(last=False)
        return True


class KeptSlices:
    """Up to which version one generation's slices are durable."""

    def __init__(self) -> None:
        self._version = -1
        self._closed = False
        self._changed = trio.Event()

    def note(self, version: int) -> None:
        """That version is, too."""
        self._version = max(self._version, version)
        self._changed.set()
        self._changed = trio.Event()

    def close(self) -> None:
        """The generation is over: nothing more is kept of it."""
        self._closed = True
        self._changed.set()

    async def wait(self, version: int) -> bool:
        """Return when ``version`` is durable; False when it will not be any more."""
        while self._version < version and not self._closed:
            await self._changed.wait()
        return not self._closed


class RequestHandlers:
    """Answers ``ReportEvent`` and ``NextSlice``, and takes the report stream. ``current`` is the current
    generation: where it begins, and what of its slices is kept. ``handle`` returns what the round machine
    answers.
    """

    def __init__(
        self,
        node: Node,
        dataset: ServedDataset,
        current: Callable[[], tuple[Start, KeptSlices]],
        handle: Callable[[Input], AnswerSlice | None],
        is_leased: Callable[[str, str], bool],
    ) -> None:
        self._node = node
        self._dataset = dataset
        self._current = current
        self._handle = handle
        self._is_leased = is_leased
        self._seen = Seen()

    def open(self) -> None:
        """Answer from now on."""
        self._node.answer(ReportEvent, self._event)
        self._node.answer(NextSlice, self._slice)
        self._node.answer_reports(self._reports, admits=self._is_partner)

    async def _event(self, caller: str, request: ReportEvent) -> Acknowledged:
        if not self._is_leased(caller, request.kind):
            self._handle(Disregarded("no lease"))
            raise Refused("stale", "this scheduler holds no lease of yours for that any more")
        if self._seen.first_time((caller, request.kind, request.incarnation), request.seq):
            self._handle(Told(caller, request.kind, request.incarnation, request.stamp, request.event))
        return Acknowledged()

    async def _slice(self, caller: str, request: NextSlice) -> SliceAssigned | NoSlice:
        start, kept = self._current()
        if not self._is_leased(caller, "train"):
            self._handle(Disregarded("no lease"))
            raise Refused("uninvited", "you take no part in this scheduler's job")
        if request.stamp.job_id != start.job_id:
            raise Refused("not-found", f"job {request.stamp.job_id} does not run here")
        if request.stamp.generation != start.generation:
            self._handle(Disregarded("stale generation"))
            raise Refused("stale", "the job has begun another generation")
        if not self._dataset.providers:
            return NoSlice(retry_in_s=1.0, reason="no data node serves the dataset right now")
        answer = self._handle(SliceAsked(caller, request))
        if answer is None or answer.slice is None:
            return NoSlice(retry_in_s=_RETRY_S, reason=answer.reason if answer is not None else "try again")
        if not await kept.wait(answer.kept):
            raise Refused("stale", "the job has begun another generation")
        got = answer.slice
        part = self._dataset.manifest.slices[got.index]
        return SliceAssigned(
            dataset=self._dataset.name,
            index=got.index,
            epoch=got.epoch,
            samples=got.samples,
            size=part.size,
            blake3=part.blake3,
            providers=self._dataset.providers_for(got.index),
            ahead=answer.ahead,
        )

    def _is_partner(self, peer: str) -> bool:
        return any(self._is_leased(peer, kind) for kind in get_args(ExecutorClass))

    def _reports(self, caller: str, reports: list[Report]) -> None:
        for report in reports:
            self._handle(Reported(caller, report.incarnation, report.stamp, report.progress))

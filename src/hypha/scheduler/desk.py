"""The scheduler's front desk: what workers ask and tell, checked and handed to the round machine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable

from hypha.errors import Refused
from hypha.messages import Acknowledged, NextSlice, NoSlice, Report, ReportEvent, SliceAssigned
from hypha.node import Node
from hypha.scheduler.datasets import Dataset
from hypha.scheduler.events import Input, Reported, Told
from hypha.scheduler.rounds import RoundMachine
from hypha.scheduler.slices import Assignment

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


class Desk:
    """Answers ``ReportEvent`` and ``NextSlice``, and takes the report stream. ``kept`` returns when the
    ledger has who trains on which slice.
    """

    def __init__(
        self,
        node: Node,
        machine: Callable[[], RoundMachine | None],
        dataset: Dataset,
        handle: Callable[[Input], None],
        is_leased: Callable[[str, str], bool],
        kept: Callable[[], Awaitable[None]],
    ) -> None:
        self._node = node
        self._machine = machine
        self._dataset = dataset
        self._handle = handle
        self._is_leased = is_leased
        self._kept = kept
        self._seen = Seen()

    def open(self) -> None:
        """Answer from now on."""
        self._node.answer(ReportEvent, self._event, roles={"worker"})
        self._node.answer(NextSlice, self._slice, roles={"worker"})
        self._node.answer_reports(self._reports, roles={"worker"})

    async def _event(self, caller: str, request: ReportEvent) -> Acknowledged:
        if not self._is_leased(caller, request.kind):
            self._count("no lease")
            raise Refused("stale", "this scheduler holds no lease of yours for that any more")
        if self._seen.first_time((caller, request.kind, request.incarnation), request.seq):
            self._handle(Told(caller, request.kind, request.incarnation, request.stamp, request.event))
        return Acknowledged()

    async def _slice(self, caller: str, request: NextSlice) -> SliceAssigned | NoSlice:
        machine = self._machine()
        if machine is None or not self._is_leased(caller, "train"):
            self._count("no lease")
            raise Refused("uninvited", "you take no part in this scheduler's job")
        if request.stamp.job_id != machine.start.job_id:
            raise Refused("not-found", f"job {request.stamp.job_id} does not run here")
        if request.stamp.generation != machine.start.generation:
            self._count("stale generation")
            raise Refused("stale", "the job has begun another life")
        if not self._dataset.providers:
            return NoSlice(retry_in_s=1.0, reason="no data node serves the dataset right now")
        got = machine.next_slice(caller, request)
        if not isinstance(got, Assignment):
            return NoSlice(retry_in_s=_RETRY_S, reason=got)
        # a worker may hold only what another scheduler would know of
        await self._kept()
        if self._machine() is not machine:
            raise Refused("stale", "the job has begun another life")
        part = self._dataset.manifest.slices[got.index]
        return SliceAssigned(
            dataset=self._dataset.name,
            index=got.index,
            epoch=got.epoch,
            samples=got.samples,
            size=part.size,
            blake3=part.blake3,
            providers=self._dataset.providers_for(got.index),
            # all of them together hold half an epoch at most
            ahead=max(1, len(machine.tracker.samples) // (2 * max(1, len(machine.members)))),
        )

    def _count(self, what: str) -> None:
        machine = self._machine()
        if machine is not None:
            machine.counts[what] += 1

    def _reports(self, caller: str, reports: list[Report]) -> None:
        for report in reports:
            self._handle(Reported(caller, report.incarnation, report.stamp, report.progress))

"""Ten bugs of the kind that people put into such a system, each to be found by the simulated world.

``python -m hypha.simulation --with tests.simulation.bugs:dropped_action`` runs random schedules with one of
them in. Each function changes the running code; what it does wrong stands in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from hypha.messages import UpdateReceived
from hypha.net.bulk.turns import TransferSlots
from hypha.rules.leases import BookAction, BookEvent, Drained, LeaseBook
from hypha.runtime import in_thread
from hypha.scheduler.durable.ledger import Ledger
from hypha.scheduler.job.working import WorkingJob
from hypha.scheduler.leasing.renewal import Renewal
from hypha.scheduler.rounds.events import Action, Again, Told
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.participants import Member


def dropped_action() -> None:
    """An executor that failed is never started again: the action that says so is not carried out."""
    right = WorkingJob._carry_out

    async def carry_out(self: WorkingJob, action: Action) -> None:
        if not isinstance(action, Again):
            await right(self, action)

    WorkingJob._carry_out = carry_out


def lease_freed_twice() -> None:
    """When an executor has ended, its lease goes, too; it is still held, and freed once more at its end."""
    right = LeaseBook.handle

    def handle(self: LeaseBook, event: BookEvent, now: float) -> list[BookAction]:
        actions = right(self, event, now)
        if isinstance(event, Drained):
            self._live.pop(event.lease_id, None)
        return actions

    LeaseBook.handle = handle


def slice_used_too_early() -> None:
    """A slice counts as used when the parameter server has the update, not when the round was applied."""
    right = RoundMachine._update_received

    def update_received(self: RoundMachine, told: Told, event: UpdateReceived, now: float) -> list[Action]:
        actions = right(self, told, event, now)
        if event.contribution is not None and event.round == self.round:
            self.tracker.finish(event.worker, event.contribution.finished)
        return actions

    RoundMachine._update_received = update_received


def update_counted_twice() -> None:
    """An update of the round before, which the parameter server reports again to the scheduler that takes
    over, counts in the open round, too.
    """
    right = RoundMachine._update_received

    def update_received(self: RoundMachine, told: Told, event: UpdateReceived, now: float) -> list[Action]:
        part = event.contribution
        if part is not None and event.round == self.round - 1:
            part = msgspec.structs.replace(part, round=self.round)
            event = msgspec.structs.replace(event, round=self.round, contribution=part)
        return right(self, told, event, now)

    RoundMachine._update_received = update_received


def stale_generation_accepted() -> None:
    """What an executor said in an earlier generation of the job is believed."""
    right = RoundMachine.told

    def told(self: RoundMachine, event: Told, now: float) -> list[Action]:
        stamp = msgspec.structs.replace(event.stamp, generation=self.start.generation)
        return right(self, msgspec.structs.replace(event, stamp=stamp), now)

    RoundMachine.told = told


def checkpoint_announced_too_early() -> None:
    """The ledger names a checkpoint before its files are in their place."""
    right = WorkingJob._checkpointed

    async def checkpointed(self: WorkingJob, round_: int, place: str) -> None:
        await self.ledger.run(Ledger.checkpoint, round_, "scheduler")
        await in_thread(int)
        await right(self, round_, place)

    WorkingJob._checkpointed = checkpointed


def theta_never_sent_again() -> None:
    """A theta that did not arrive is not sent again."""

    def resend(self: RoundMachine, now: float) -> list[Action]:
        return []

    RoundMachine._resend = resend


def wrong_deadline() -> None:
    """A worker's update is never overdue."""

    def due_at(self: Member, deadline_s: float, round_: int) -> float:
        return math.inf

    Member.due_at = due_at


def leaked_transfer_place() -> None:
    """The place of a transfer that fails is not given back."""

    @asynccontextmanager
    async def hold(self: TransferSlots, moved: Callable[[], object]) -> AsyncIterator[None]:
        holder = object()
        await self._limiter.acquire_on_behalf_of(holder)
        yield
        self._limiter.release_on_behalf_of(holder)

    TransferSlots.hold = hold


def cut_never_noticed() -> None:
    """A lease that was renewed once is believed in for ever, so whoever is cut off is waited for."""
    right = Renewal._renewed

    def renewed(self: Renewal, expires_in_s: float, now: float) -> list[object]:
        actions = right(self, expires_in_s, now)
        self.expires_at += 1e6
        return actions

    Renewal._renewed = renewed


BUGS = (
    dropped_action,
    lease_freed_twice,
    slice_used_too_early,
    update_counted_twice,
    stale_generation_accepted,
    checkpoint_announced_too_early,
    theta_never_sent_again,
    wrong_deadline,
    leaked_transfer_place,
    cut_never_noticed,
)

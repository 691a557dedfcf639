"""The round machine of the current generation and what drives it: events go in, its actions come out in
order.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import trio

from hypha.messages import JobStamp
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.durable.starts import Generation
from hypha.scheduler.handlers import KeptSlices
from hypha.scheduler.job.states import JobContext
from hypha.scheduler.rounds.events import Action, AnswerSlice, DataServed, Input, LeasesHeld, Record
from hypha.scheduler.rounds.machine import RoundMachine
from hypha.scheduler.rounds.policy import CarriedOver, Start


@dataclass(frozen=True)
class CurrentGeneration:
    """The current generation, its machine, and what of its slices is durable."""

    generation: Generation
    machine: RoundMachine
    kept: KeptSlices

    @property
    def start(self) -> Start:
        """Where it began."""
        return self.generation.start


class RoundDriver:
    """Drives the round machine of a job that begins with ``generation``; of its slices, workers that are not
    ``leased`` any more lose theirs. :attr:`actions` are what the machines decide, for one reader.
    """

    def __init__(self, context: JobContext, generation: Generation, leased: Collection[str]) -> None:
        self._context = context
        self._send, self.actions = trio.open_memory_channel[Action](math.inf)
        #: what the present machine was given of its surroundings, by the event's name
        self._surroundings: dict[str, Input] = {}
        self.current = self._generation_of(generation, CarriedOver(), leased)

    def begin(self, generation: Generation, carried: CarriedOver, leased: Collection[str]) -> None:
        """Go on with another generation, whose machine gets what was ``carried`` over."""
        self.current.kept.close()
        self.current = self._generation_of(generation, carried, leased)
        self._surroundings = {}

    def _generation_of(
        self, generation: Generation, carried: CarriedOver, leased: Collection[str]
    ) -> CurrentGeneration:
        tracker = SliceTracker.from_state(generation.tracker)
        for worker in tracker.holders:
            if worker not in leased:
                tracker.forget(worker)
        context = self._context
        machine = RoundMachine(
            context.rules, generation.start, tracker, context.node.ref(), carried, context.journal
        )
        return CurrentGeneration(generation, machine, KeptSlices())

    @property
    def stamp(self) -> JobStamp:
        """Of the current generation."""
        return JobStamp(job_id=self.current.start.job_id, generation=self.current.start.generation)

    def is_server(self, peer: str, stamp: JobStamp | None) -> bool:
        """Whether ``peer`` is the parameter server of the current generation, which ``stamp`` is of."""
        server = self.current.machine.server
        if server is None or server.peer != peer:
            return False
        return stamp is not None and stamp.generation == self.current.start.generation

    def handle(self, event: Input) -> AnswerSlice | None:
        """Have the machine handle ``event``. What follows is carried out in order, and soon; the reply to a
        request for a slice is returned.
        """
        reply: AnswerSlice | None = None
        for action in self.current.machine.handle(event, trio.current_time()):
            if isinstance(action, AnswerSlice):
                reply = action
                continue
            if isinstance(action, Record):
                # at once: a snapshot never shows the next round with the last one's numbers
                self._context.progressed.add(action.entry)
                self._context.pool.worked(action.entry)
            self._send.send_nowait(action)
        return reply

    def handle_change(self, event: DataServed | LeasesHeld) -> None:
        """Have the present machine handle ``event``, unless that is what it was given last."""
        name = type(event).__name__
        if self._surroundings.get(name) != event:
            self._surroundings[name] = event
            self.handle(event)

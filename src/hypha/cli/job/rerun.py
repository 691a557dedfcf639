"""A journal once more: the machines are made anew and given the same events; what they return now is compared
with what they answered then. ``hypha replay --journal`` does it.

After a machine has answered otherwise its state is another one, so the first difference is where to look.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from hypha.config.offers import OfferConfig
from hypha.decoding import decode
from hypha.errors import HyphaError, Undecodable
from hypha.journal import Journal
from hypha.messages import PeerRef
from hypha.scheduler.data.slices import SliceTracker
from hypha.scheduler.leasing import allocator, renewal
from hypha.scheduler.leasing import events as allocation
from hypha.scheduler.rounds import events
from hypha.scheduler.rounds import machine as rounds
from hypha.worker.leasing import arbiter
from hypha.worker.leasing.events import ArbiterBegan, ArbiterEvent
from hypha.worker.leasing.terms import WorkerCapacity

#: An arbiter's leases had entries of their own before 0.1.0; it decides about them, and is run again.
_PART_OF_ARBITER = "leases"
#: of a line that is shown
_SHOWN = 2000


@dataclass(frozen=True)
class Difference:
    """``machine`` made of ``event`` what is in ``now``, not ``then``; ``what``: its actions, or its state."""

    number: int
    machine: str
    event: str
    what: str
    then: str
    now: str


@dataclass
class Rerun:
    """Of ``without_beginning`` entries the machines are not known, as their first ones are missing."""

    entries: int = 0
    machines: int = 0
    without_beginning: int = 0
    difference: Difference | None = None


class _Given(Random):
    """Gives what chance gave then. Where the machine asks for more it is 0: that is a difference."""

    def __init__(self) -> None:
        super().__init__(0)
        self.left: deque[Any] = deque()

    def random(self) -> float:
        return float(self.left.popleft()) if self.left else 0.0

    def lease_id(self) -> str:
        return str(self.left[0][0]) if self.left else ""

    def worker(self) -> PeerRef:
        return msgspec.convert(self.left.popleft()[1], PeerRef) if self.left else PeerRef(peer="")


@dataclass
class _Machine:
    """What it decides on an event of ``kind`` is noted in ``journal``."""

    handle: Callable[[Any, float], object]
    kind: Any
    journal: Journal
    given: _Given


def print_rerun(journal: Path) -> int:
    """Print what :func:`rerun` finds; 0 when the machines decide as they did."""
    result = rerun(journal)
    if result.without_beginning:
        print(f"{result.without_beginning} entries are of machines whose beginning is not in {journal}")
    if (found := result.difference) is not None:
        print(f"entry {found.number}: {found.machine} answers {found.event} with other {found.what}")
        print(f"  then: {found.then}")
        print(f"  now:  {found.now}")
        return 1
    print(f"{result.entries} entries of {result.machines} machines: all decide as they did")
    return 0 if result.entries else 1


def rerun(path: Path) -> Rerun:
    """Until the first difference. Raises :class:`HyphaError` when ``path`` cannot be read."""
    result = Rerun()
    machines: dict[str, _Machine] = {}
    for line in _lines(path):
        try:
            entry = decode(json.loads, line)
        except Undecodable:
            # whoever wrote it was killed meanwhile: what follows does not go on from what was before
            machines.clear()
            continue
        if not isinstance(entry, dict) or "machine" not in entry:
            continue
        try:
            difference = _tell(machines, entry, result)
        except Exception as exc:  # whoever wrote the file: a machine is given what none ever was
            raise HyphaError(f"{path} is no journal of this version: {exc}, in {_short(entry)}") from exc
        if difference is not None:
            result.difference = difference
            break
    return result


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as exc:
        raise HyphaError(f"the journal {path} cannot be read: {exc}") from exc


def _tell(machines: dict[str, _Machine], entry: dict[str, Any], result: Rerun) -> Difference | None:
    name, event, now = entry["machine"], entry["event"], float(entry["at_s"])
    if name == _PART_OF_ARBITER:
        result.machines += event["type"] == "BookBegan"
        result.entries += 1
        return None
    if event["type"].endswith("Began"):
        machines[name] = machine = _made(msgspec.convert(event, _First), now)
        result.machines += 1
    elif name in machines:
        machine = machines[name]
        machine.given.left = deque(entry["drawn"])
        machine.handle(msgspec.convert(event, machine.kind), now)
    else:
        result.without_beginning += 1
        return None
    result.entries += 1
    noted = [json.loads(one.line()) for one in machine.journal.entries]
    machine.journal.entries.clear()
    again = noted[-1] if noted else {}
    for what in ("actions", "state"):
        if not _equal(entry[what], again.get(what)):
            then, differs = _short(entry[what]), _short(again.get(what, "nothing"))
            return Difference(entry["number"], name, _short(event), what, then, differs)
    return None


def _equal(then: object, now: object) -> bool:
    if isinstance(then, dict) and isinstance(now, dict):
        # an earlier version may have noted less: what it did not know is as it is where nobody says it
        same = all(key in now and _equal(then[key], now[key]) for key in then)
        return same and not any(now[key] for key in now.keys() - then.keys())
    if isinstance(then, list) and isinstance(now, list):
        return len(then) == len(now) and all(map(_equal, then, now))
    if isinstance(then, float) and isinstance(now, float) and math.isnan(then):
        return math.isnan(now)
    return then == now


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_First = events.GenerationBegan | allocation.AllocatorBegan | renewal.RenewalBegan | ArbiterBegan


def _made(began: _First, now: float) -> _Machine:
    """The machine whose first entry has ``began`` as its event."""
    journal, given = Journal(), _Given()
    match began:
        case events.GenerationBegan(rules=rules, start=start, scheduler=scheduler, carried=carried):
            tracker = SliceTracker.from_state(began.tracker)
            machine = rounds.RoundMachine(rules, start, tracker, scheduler, carried, journal=journal)
            return _Machine(machine.handle, events.Input, journal, given)
        case allocation.AllocatorBegan(asks=asks, pace=pace):
            finding = allocator.Allocator(asks, pace, journal)
            return _Machine(finding.handle, allocation.AllocatorEvent, journal, given)
        case renewal.RenewalBegan(expires_in_s=expires_in_s):
            renewing = renewal.Renewal(expires_in_s, now, given, journal=journal)
            return _Machine(renewing.handle, renewal.RenewalEvent, journal, given)
        case ArbiterBegan():
            capacity = WorkerCapacity(began.total, began.executors, began.gpus, began.abilities)
            terms = OfferConfig.model_validate(began.terms)
            offering = arbiter.Arbiter(capacity, terms, given.worker, given.lease_id, journal)
            return _Machine(offering.handle, ArbiterEvent, journal, given)

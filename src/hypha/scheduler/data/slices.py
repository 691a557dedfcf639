"""Who trains on which slice: AVAILABLE -> ASSIGNED -> USED, once per slice and epoch.

The tracker promises that a slice of an epoch is never with two workers at once, that it counts as used
only when an applied update contained its last row, that what a lost worker held is handed out again,
and that asking twice with the same number gives the same answer. A new epoch opens as soon as nothing
is AVAILABLE in the open ones, so slow holders of old slices block nobody. Pure: no clock, no I/O.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from msgspec import Struct

from hypha.errors import DataError

#: answers kept per worker, so that a repeated request gets the same one, besides those whose slices it has.
#: It sends one request after the other; all are kept, and written, with every state
_REMEMBERED_ANSWERS = 32
#: how many AVAILABLE slices are looked at for one that no other worker has cached
_LOOK_AHEAD = 64
#: of the slices that a worker reports as cached so many count; the rest of its report is not looked at
_MOST_CACHED = 4096


class Assignment(Struct, frozen=True):
    """Slice ``index`` in ``epoch``; ``samples`` rows."""

    epoch: int
    index: int
    samples: int


class EpochState(Struct, frozen=True):
    """An open epoch: what is neither in ``used`` nor in ``assigned`` (index, worker) is AVAILABLE."""

    epoch: int
    used: tuple[int, ...]
    assigned: tuple[tuple[int, str], ...] = ()


class AnswerState(Struct, frozen=True):
    """What ``worker`` got for its request ``seq``."""

    worker: str
    incarnation: str
    seq: int
    epoch: int
    index: int


class TrackerState(Struct, frozen=True):
    """All a tracker knows. Epochs before ``next_epoch`` that are not listed are complete."""

    samples: tuple[int, ...]
    next_epoch: int
    epochs: tuple[EpochState, ...] = ()
    answers: tuple[AnswerState, ...] = ()
    #: counts the changes; of two states of one generation the higher is the newer
    version: int = 0

    def unassigned(self) -> TrackerState:
        """The same after everybody was lost: ASSIGNED is AVAILABLE again, and no request was answered."""
        epochs = tuple(EpochState(epoch.epoch, epoch.used) for epoch in self.epochs)
        return TrackerState(self.samples, self.next_epoch, epochs)


class _Epoch:
    def __init__(self, epoch: int, count: int, used: Iterable[int] = ()) -> None:
        self.epoch = epoch
        self.used = set(used)
        self.assigned: dict[int, str] = {}
        self.available = set(range(count)) - self.used
        self.order = sorted(self.available)
        self._used_state: tuple[int, ...] | None = None

    @property
    def used_state(self) -> tuple[int, ...]:
        """USED ones in order, the same object until they change: states of one round share it."""
        if self._used_state is None:
            self._used_state = tuple(sorted(self.used))
        return self._used_state

    def use(self, index: int) -> None:
        del self.assigned[index]
        self.used.add(index)
        self._used_state = None

    def give_back(self, index: int) -> None:
        del self.assigned[index]
        self.available.add(index)
        heapq.heappush(self.order, index)

    def pick(self, cached: Sequence[int], elsewhere: set[int]) -> int:
        """An AVAILABLE slice: one of ``cached``, else one nobody else has, else the lowest."""
        for index in cached:
            if index in self.available:
                return index
        looked: list[int] = []
        while self.order and len(looked) < _LOOK_AHEAD:
            index = heapq.heappop(self.order)
            if index not in self.available or (looked and looked[-1] == index):
                continue
            looked.append(index)
            if index not in elsewhere:
                break
        for index in looked:
            heapq.heappush(self.order, index)
        return looked[0] if looked[-1] in elsewhere else looked[-1]


class SliceTracker:
    """The slices of one dataset; ``samples`` are the rows of each. At least one slice, each of at least
    one row, else :class:`DataError`.
    """

    def __init__(self, samples: Sequence[int]) -> None:
        if not samples or min(samples) < 1:
            raise DataError("the dataset has no slices, or a slice without samples: prepare it again")
        self.samples = tuple(samples)
        #: the rows of the largest slice: asked for at each event, and a dataset may have a million slices
        self.most_rows = max(self.samples)
        self._epochs: dict[int, _Epoch] = {}
        self._next_epoch = 0
        #: of each worker by its requests; the objects that states have, so that many states share them
        self._answers: dict[str, OrderedDict[int, AnswerState]] = {}
        self._incarnation: dict[str, str] = {}
        self._cached: dict[str, tuple[int, ...]] = {}
        self.version = 0
        self._validated = -1
        #: worker -> rows of the slices that are ASSIGNED to it
        self._rows: Counter[str] = Counter()

    @property
    def holders(self) -> tuple[str, ...]:
        """Workers to whom slices are ASSIGNED, in order of their names."""
        return tuple(
            sorted({worker for epoch in self._epochs.values() for worker in epoch.assigned.values()})
        )

    @property
    def epoch(self) -> int:
        """The oldest epoch that is not complete."""
        return min(self._epochs, default=self._next_epoch)

    def counts(self) -> dict[str, int]:
        """Slices of the oldest open epoch by their state: ``available``, ``assigned``, ``used``."""
        epoch = self._epochs.get(self.epoch) or _Epoch(self.epoch, len(self.samples))
        return {
            "available": len(epoch.available),
            "assigned": len(epoch.assigned),
            "used": len(epoch.used),
        }

    def next(self, worker: str, incarnation: str, seq: int, cached: Sequence[int] = ()) -> Assignment:
        """The slice for the question ``seq`` of this process of ``worker``.

        A new ``incarnation`` means that the earlier process is gone: what it held returns first.
        """
        if self._incarnation.get(worker, incarnation) != incarnation:
            self.lose(worker)
        self._incarnation[worker] = incarnation
        known = (index for index in cached[:_MOST_CACHED] if 0 <= index < len(self.samples))
        cached = self._cached[worker] = tuple(dict.fromkeys(known))
        answers = self._answers.setdefault(worker, OrderedDict())
        if seq in answers:
            return self._assignment(answers[seq])
        open_ = (number for number, epoch in self._epochs.items() if epoch.available)
        number = min(open_, default=self._next_epoch)
        if number == self._next_epoch:
            self._epochs[number] = _Epoch(number, len(self.samples))
            self._next_epoch += 1
        epoch = self._epochs[number]
        elsewhere = {index for other, indices in self._cached.items() if other != worker for index in indices}
        index = epoch.pick(cached, elsewhere)
        epoch.available.discard(index)
        epoch.assigned[index] = worker
        self._count(worker, index, 1)
        self.version += 1
        answers[seq] = AnswerState(worker, incarnation, seq, epoch.epoch, index)
        self._forget_oldest(answers)
        return self._assignment(answers[seq])

    def was_told(self, worker: str, incarnation: str, seq: int) -> bool:
        """This process of ``worker`` asked with ``seq`` before: it gets the same answer."""
        return self._incarnation.get(worker) == incarnation and seq in self._answers.get(worker, ())

    def holds(self, worker: str, epoch: int, index: int) -> bool:
        """That slice is ASSIGNED to ``worker``."""
        found = self._epochs.get(epoch)
        return found is not None and found.assigned.get(index) == worker

    def rows_held(self, worker: str) -> int:
        """Rows of all slices that are ASSIGNED to ``worker``."""
        return self._rows[worker]

    def _count(self, worker: str, index: int, change: int) -> None:
        self._rows[worker] += change * self.samples[index]
        if not self._rows[worker]:
            del self._rows[worker]

    def _forget_oldest(self, answers: OrderedDict[int, AnswerState]) -> None:
        """Of a worker's answers: what it holds it can still give back, see :meth:`dropped`."""
        spent = [seq for seq, one in answers.items() if not self.holds(one.worker, one.epoch, one.index)]
        for seq in spent[: max(0, len(spent) - _REMEMBERED_ANSWERS)]:
            del answers[seq]

    def _assignment(self, given: AnswerState) -> Assignment:
        return Assignment(given.epoch, given.index, self.samples[given.index])

    def dropped(self, worker: str, incarnation: str, held_from: int, keep: Iterable[tuple[int, int]]) -> None:
        """``worker`` holds nothing any more of what it got for a ``seq`` before ``held_from``: that returns,
        except ``keep`` (the outcome of its update is still open).
        """
        if self._incarnation.get(worker) != incarnation:
            return
        answers = self._answers.get(worker, OrderedDict())
        old = [answers.pop(seq) for seq in list(answers) if seq < held_from]
        if not old:
            return
        again = {(answer.epoch, answer.index) for answer in answers.values()} | set(keep)
        self.give_back(worker, sorted({(answer.epoch, answer.index) for answer in old} - again))

    def finish(self, worker: str, finished: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Mark (epoch, slice) pairs USED; the pairs that ``worker`` did not hold are returned, unchanged."""
        foreign = []
        self.version += 1
        for number, index in finished:
            if not self.holds(worker, number, index):
                foreign.append((number, index))
                continue
            epoch = self._epochs[number]
            epoch.use(index)
            self._count(worker, index, -1)
            if len(epoch.used) == len(self.samples):
                del self._epochs[number]
        return foreign

    def lose(self, worker: str, keep: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int]]:
        """Return what ``worker`` holds to AVAILABLE, except ``keep`` (the outcome of its update is still
        open); the returned (epoch, slice) pairs. Its answers are forgotten.
        """
        kept = set(keep)
        returned = [pair for pair in self.held(worker) if pair not in kept]
        self.give_back(worker, returned)
        self._answers.pop(worker, None)
        return returned

    def forget(self, worker: str, keep: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int]]:
        """Like :meth:`lose` for a worker that is gone: its cache does not count any more."""
        self._cached.pop(worker, None)
        self._incarnation.pop(worker, None)
        return self.lose(worker, keep)

    def give_back(self, worker: str, pairs: Iterable[tuple[int, int]]) -> None:
        """Return those of ``pairs`` that ``worker`` still holds to AVAILABLE."""
        self.version += 1
        for number, index in pairs:
            if self.holds(worker, number, index):
                self._epochs[number].give_back(index)
                self._count(worker, index, -1)

    def held(self, worker: str) -> list[tuple[int, int]]:
        return [
            (number, index)
            for number, epoch in sorted(self._epochs.items())
            for index, holder in sorted(epoch.assigned.items())
            if holder == worker
        ]

    def validate(self) -> None:
        """Assert that every slice of an open epoch is in exactly one place. For tests and simulation."""
        assert self.version >= self._validated, "the version went back"
        if self.version == self._validated:
            return
        self._validated = self.version
        everything = set(range(len(self.samples)))
        for number, epoch in self._epochs.items():
            assert 0 <= number < self._next_epoch, f"epoch {number} is open before its time"
            places = (epoch.used, epoch.assigned.keys(), epoch.available)
            assert sum(len(place) for place in places) == len(everything), f"epoch {number}: {places}"
            assert set().union(*places) == everything, f"epoch {number}: {places}"
            assert len(epoch.used) < len(everything), f"epoch {number} is complete, but open"
            assert epoch.available <= set(epoch.order), f"epoch {number}: {epoch.available} cannot be found"
        held = [(worker, index) for one in self._epochs.values() for index, worker in one.assigned.items()]
        rows: Counter[str] = Counter()
        for worker, index in held:
            rows[worker] += self.samples[index]
        assert self._rows == rows, f"{self._rows} are not those of {held}"
        for worker, answers in self._answers.items():
            assert not answers or worker in self._incarnation, f"{worker} was answered, but did not ask"
            assert all(given.worker == worker for given in answers.values())

    def to_state(self) -> TrackerState:
        return TrackerState(
            samples=self.samples,
            next_epoch=self._next_epoch,
            epochs=tuple(
                EpochState(number, epoch.used_state, tuple(sorted(epoch.assigned.items())))
                for number, epoch in sorted(self._epochs.items())
            ),
            answers=tuple(
                given for _, answers in sorted(self._answers.items()) for given in answers.values()
            ),
            version=self.version,
        )

    @classmethod
    def from_state(cls, state: TrackerState) -> SliceTracker:
        """A tracker that goes on where ``state`` was taken."""
        tracker = cls(state.samples)
        tracker._next_epoch = state.next_epoch
        tracker.version = state.version
        for kept in state.epochs:
            epoch = _Epoch(kept.epoch, len(state.samples), kept.used)
            epoch.assigned = dict(kept.assigned)
            epoch.available -= set(epoch.assigned)
            for index, worker in epoch.assigned.items():
                tracker._count(worker, index, 1)
            tracker._epochs[kept.epoch] = epoch
        for given in state.answers:
            tracker._incarnation[given.worker] = given.incarnation
            tracker._answers.setdefault(given.worker, OrderedDict())[given.seq] = given
        return tracker

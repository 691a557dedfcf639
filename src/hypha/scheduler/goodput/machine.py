"""What the time of a job's worker places goes to: goodput, and badput by reason. A pure machine.

It is fed with the journal of the round machine, the allocator and the renewals, and follows what they were
told and decided; they do not know of it. For every worker that the job wants there is a place, whose every
nanosecond since the scheduler began is in exactly one of:

- goodput: batches, where their update is in an applied round that counts;
- ``allocating``: nobody is leased for the place, or no parameter server;
- ``loading``: leased, and the model not there yet, or not that of others whom the start waits for;
- ``waiting-for-data``: time of a round that was spent in no batch;
- ``waiting-for-theta``: from the last batch until the parameter server has the update, and from closing the
  round until training begins again; at the end, while the model is exported;
- ``waiting-for-stragglers``: the update is with the parameter server, and the round is not closed;
- ``failure``: from the last sign of life of what was lost here until somebody trains here again; after the
  loss of a parameter server, or a scheduler, for those who can do nothing without it;
- ``replayed``: batches of rounds that were discarded, of attempts that were refused, of updates left out or
  never sent;
- ``paused``: the update is there, and the round kept open for lack of workers; or nobody served data.

A round's batches are pending until it is applied. If the job goes back to an older checkpoint, what was
goodput becomes ``replayed``. :meth:`Goodput.certain` is what cannot change any more, for counters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median

from hypha.journal import JournalEntry
from hypha.scheduler.goodput.following import Following
from hypha.scheduler.goodput.leases import NANOSECONDS, nanoseconds
from hypha.scheduler.goodput.place import TRAINING
from hypha.scheduler.goodput.report import GoodputNews, GoodputReport
from hypha.scheduler.leasing.allocator import NAME as ALLOCATOR
from hypha.scheduler.leasing.renewal import NAME as RENEWAL
from hypha.scheduler.rounds.machine import NAME as ROUNDS
from hypha.telemetry.instruments import BADPUT_REASONS


class Goodput(Following):
    """Of a job that wants ``places`` workers, whose scheduler began at ``began`` (seconds of the clock that
    the journal's entries have).
    """

    def resume(self, samples: Mapping[int, int]) -> None:
        """An earlier scheduler of the job has left these ``samples``, by round."""
        self._samples = dict(samples)
        self._total, self._here = sum(samples.values()), 0
        self._first = max(samples, default=-1) + 1

    def report(self, now: float) -> GoodputReport:
        """As far as is known at ``now``; after the job's end, as it was then."""
        at = self._at(now)
        total: Counter[str] = Counter()
        for place in self.places:
            place.add_to(total, at)
        wall_s = (at - self.began) / NANOSECONDS
        rate = self._here / wall_s if wall_s > 0 else 0.0
        calm = median(self._calm) if self._calm else None
        wanted = len(self.places) * (at - self.began)
        return GoodputReport(
            wall_s=wall_s,
            places=len(self.places),
            goodput_s=(total["goodput"] + total[TRAINING]) / NANOSECONDS,
            pending_s=total[TRAINING] / NANOSECONDS,
            badput_s={reason: total[reason] / NANOSECONDS for reason in BADPUT_REASONS},
            samples=self._total,
            samples_per_s=rate,
            calm_samples_per_s=calm,
            runtime=rate / calm if calm else None,
            scheduling=sum(place.leased_by(at) for place in self.places) / wanted if wanted else 0.0,
            recoveries=self.recoveries.told,
        )

    def certain(self, now: float) -> tuple[float, dict[str, float]]:
        """Seconds of goodput, and of badput by reason, that cannot change any more: training of rounds before
        the newest durable checkpoint, and what was no training up to the last sign of life.
        """
        at = self.now = self._at(now)
        badput: Counter[str] = Counter()
        for place in self.places:
            live = place.peer and not place.failed and not self.ended
            place.settle(min(at, max(place.heard, place.alive)) if live else at)
            for reason, length in place.badput.items():
                badput[reason] += length
        good = sum(place.good_before(self._checkpoint) for place in self.places)
        return good / NANOSECONDS, {reason: badput[reason] / NANOSECONDS for reason in BADPUT_REASONS}

    def validate(self) -> None:
        """Assert what always holds after an entry. For tests and simulation."""
        for number, place in enumerate(self.places):
            split: Counter[str] = Counter()
            place.add_to(split, self.now)
            lasted = self.now - self.began
            assert sum(split.values()) == lasted, f"place {number}: {split} do not make {lasted}"
            assert min(split.values(), default=0) >= 0, f"place {number}: {split}"
            strange = split.keys() - {*BADPUT_REASONS, TRAINING, "goodput"}
            assert not strange, f"place {number}: {strange} are no reasons"
            assert place.peer or place.effort is None, f"place {number}: nobody trains there"
            assert (place.effort is None) == (place.what != TRAINING), f"place {number} is {place.what}"
            assert place.good >= sum(place.goodput.values()), f"place {number}: {place.goodput}"
            assert place.since <= self.now, f"place {number} turned in the future"
        leased = [place.peer for place in self.places if place.peer]
        assert len(leased) == len(set(leased)), f"a worker has two places: {leased}"
        assert self._known in (None, len(self._members)), f"{self._known} are not {sorted(self._members)}"
        assert self._total == sum(self._samples.values()), "samples were lost"

    def _at(self, now: float) -> int:
        return self.now if self.ended else max(self.now, nanoseconds(now))

    def handle(self, entry: JournalEntry) -> list[GoodputNews]:
        """Take note of an entry, in order."""
        if self.ended:
            return []
        self._news = []
        # a machine's first entry is made before it gets the time
        now = self.now = max(self.now, nanoseconds(entry.at_s))
        if entry.machine == ROUNDS:
            self.take_round(entry, now)
        elif entry.machine == ALLOCATOR:
            self.take_allocation(entry, now)
        elif entry.machine.startswith(f"{RENEWAL}:"):
            self.take_renewal(entry, entry.machine[len(RENEWAL) + 1 :], now)
        self.look(now)
        return self._news

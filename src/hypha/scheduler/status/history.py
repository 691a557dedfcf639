"""What every round of a job was spent on: a listener of the journal, for people who come late.

:class:`History` is called with every entry that the round machine notes, and keeps one :class:`RoundRecord` a
round: when each worker trained, sent its update and waited, what the parameter server did, and what went
wrong. The newest rounds keep their spans in memory, older ones their numbers, and the oldest are dropped.
:mod:`hypha.scheduler.status.history_file` makes it durable. It decides nothing, and what goes wrong in it is
logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import msgspec

from hypha.journal import JournalEntry
from hypha.messages import (
    CloseRound,
    ExecutorClass,
    ExecutorError,
    ExecutorExited,
    LedgerRound,
    Loaded,
    ModelReady,
    Plan,
    RoundStarted,
    UpdateReceived,
    UpdateRefused,
)
from hypha.node import Changes
from hypha.runtime import wall_time
from hypha.scheduler.rounds.events import (
    Again,
    DataServed,
    Drop,
    Fail,
    GenerationBegan,
    JobRefused,
    Joined,
    LetGo,
    ParticipantLost,
    Reachable,
    Record,
    Reported,
    Restart,
    Send,
    Told,
    Unreachable,
)
from hypha.scheduler.rounds.failures import exit_text
from hypha.scheduler.rounds.machine import NAME
from hypha.scheduler.status.round_record import (
    Fault,
    Key,
    OpenRound,
    RoundRecord,
    Track,
    rounded,
    with_numbers,
    without_spans,
)

logger = logging.getLogger("hypha.scheduler")

#: records in memory; and how many parts of workers all of them together have at most
KEPT, KEPT_PARTS = 2000, 20_000
#: rounds whose spans stay in memory
DETAILED = 50
_MAX_FAULTS, _MAX_TEXT = 50, 200


class History:
    """Records of one job's rounds; :meth:`note` is a listener of the job's journal. ``finished`` notes every
    record that is complete, and :meth:`unsaved` hands those out once. ``redact`` takes secrets out of what
    peers report and errors quote, before any of it is kept.
    """

    def __init__(
        self, wall: Callable[[], float] = wall_time, redact: Callable[[str], str] | None = None
    ) -> None:
        self._wall = wall
        self._redact = redact
        self._records: dict[Key, RoundRecord] = {}
        self._changed: dict[Key, int] = {}
        self._open: OpenRound | None = None
        self._generation: GenerationBegan | None = None
        #: who started the next round before it was opened here, and when
        self._early: dict[str, float] = {}
        self._unsaved: list[RoundRecord] = []
        self._broken = False
        #: counts changes of records; and how often all of them were replaced
        self.number = 0
        self.replaced = 0
        self.finished = Changes()

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """All that are complete, in the order in which they happened."""
        return tuple(self._records.values())

    @property
    def job(self) -> tuple[str, int] | None:
        """The job's id and its generation; None before its first generation has begun."""
        return (
            None
            if self._generation is None
            else (self._generation.start.job_id, self._generation.start.generation)
        )

    def since(self, number: int) -> tuple[RoundRecord, ...]:
        """Those that have changed after :attr:`number` was ``number``."""
        return tuple(self._records[key] for key, changed in self._changed.items() if changed > number)

    def open_round(self, now: float) -> RoundRecord | None:
        """The record of the round that is under way; ``now`` is of the machine's clock."""
        return None if self._open is None else self._open.record(now)

    def unsaved(self) -> list[RoundRecord]:
        """Records that became complete, or more complete, since this was asked last."""
        taken, self._unsaved = self._unsaved, []
        return taken

    def cleaned(self, record: RoundRecord) -> RoundRecord:
        """An earlier scheduler's ``record``, which may have known other secrets, or none. Works in any
        thread: there may be many.
        """
        if not record.faults:
            return record
        return msgspec.structs.replace(record, faults=tuple(self._clean(fault) for fault in record.faults))

    def restore(self, records: Iterable[RoundRecord]) -> None:
        """Earlier schedulers' records, before those of this one; see :meth:`cleaned`."""
        merged = {record.key: record for record in records}
        merged.update(self._records)
        self._records = dict(sorted(merged.items()))
        self.replaced += 1
        self.number += 1
        self._changed = dict.fromkeys(self._records, self.number)
        self._trim()

    def note(self, entry: JournalEntry) -> None:
        """Listen to the journal. Never raises."""
        if entry.machine != NAME or self._broken:
            return
        try:
            self._note(entry)
        except Exception:
            # a page must not end a job
            self._broken = True
            logger.exception("The history of rounds is not kept any more, as it met something unforeseen.")

    def _note(self, entry: JournalEntry) -> None:
        now, event = entry.at_s, entry.event
        if isinstance(event, GenerationBegan):
            self._begin_generation(event)
            return
        if self._open is None and self._generation is not None and _goes_on(entry):
            # the first entry of a generation has no time, so the record begins with the second
            start = self._generation.start
            self._open = self._begin(start.round, now)
        if self._open is None:
            return
        self._heard(self._open, event, now)
        applied: Record | None = None
        for action in entry.actions:
            if isinstance(action, Record):
                applied = action
            elif isinstance(action, Send):
                self._sent(self._open, action, now)
            else:
                self._acted(self._open, action, now)
        if applied is not None:
            self._applied(self._open, applied.entry, entry, now)

    def _begin_generation(self, event: GenerationBegan) -> None:
        if self._open is not None:
            # cut short: what is known of it is worth a look, as here something went wrong
            opened = self._open
            ends = [opened.at, *(fault.at_s + opened.at for fault in opened.faults)]
            ends += [track.since for track in (*opened.tracks.values(), opened.server_track)]
            self._put(opened.record(max(ends)))
        self._open, self._generation = None, event
        self._early.clear()
        # whoever reads earlier schedulers' records knows now whose they are
        self.finished.note()
        for key, record in list(self._records.items()):
            if record.round >= event.start.round and record.applied and not record.discarded:
                self._put(msgspec.structs.replace(record, discarded=True), key)

    def _begin(self, round_: int, now: float) -> OpenRound:
        assert self._generation is not None
        start = self._generation.start
        return OpenRound(start.job_id, start.generation, round_, now, self._wall())

    def _heard(self, opened: OpenRound, event: object, now: float) -> None:
        match event:
            case Joined(ref=ref, kind="train"):
                opened.tracks.setdefault(ref.peer, Track()).switch("loading", now)
            case Joined(ref=ref):
                opened.server = ref.peer
                opened.server_track.switch("loading", now)
            case Told(sender=sender, kind=kind, stamp=stamp) if stamp.generation == opened.generation:
                self._told(opened, sender, kind, event.event, now)
            case Reported(sender=sender, progress=progress) if progress.round == opened.round:
                track = opened.tracks.get(sender)
                if track is not None and progress.batches > track.batches:
                    track.batches, track.loss = progress.batches, progress.loss
                    track.reported_at, track.batch_s = now, progress.busy_s / progress.batches
                    self._look_at_plan(track, now)
            case ParticipantLost(peer=peer, kind=kind, reason=reason):
                self._gone(opened, peer, kind, now)
                self._fault(opened, now, peer, "lost", reason)
            case JobRefused(peer=peer, reason=reason):
                self._fault(opened, now, peer, "refused", reason)
            case Unreachable(peer=peer):
                self._fault(
                    opened, now, peer, "unreachable", "it cannot be reached; its lease has not expired"
                )
            case Reachable(peer=peer):
                self._fault(opened, now, peer, "reachable", "it answers again")
            case DataServed(served=False):
                self._fault(opened, now, "", "no data", "no data node serves the dataset")

    def _told(self, opened: OpenRound, sender: str, kind: ExecutorClass, event: object, now: float) -> None:
        # an executor of an earlier generation goes on without having joined this one
        track = opened.tracks.setdefault(sender, Track()) if kind == "train" else None
        match event:
            case Loaded() if track is not None and track.kind in (None, "loading"):
                track.switch("waiting", now)
            case RoundStarted(round=number) if track is not None:
                if number == opened.round + 1:
                    self._early[sender] = now
                elif number == opened.round:
                    track.batches, track.plan, track.batch_s = 0, None, 0.0
                    track.switch("training", now)
                    self._look_at_broadcast(opened, now)
            case UpdateReceived(round=number, worker=worker, contribution=known) if number == opened.round:
                if worker in opened.tracks:
                    opened.tracks[worker].sent(None if known is None else known.batches, now)
            case ModelReady() if kind == "aggregate":
                opened.server = sender
                opened.server_track.switch("collecting", now)
            case UpdateRefused(code="duplicate" | "stale"):
                pass  # a second copy, or one that came too late
            case UpdateRefused(worker=worker, code=code, reason=reason):
                self._fault(opened, now, worker, f"update refused: {code}", reason)
            case ExecutorError():
                self._fault(opened, now, sender, f"executor failed: {event.kind}", event.message)
            case ExecutorExited():
                self._fault(opened, now, sender, "executor ended", exit_text(event))

    def _sent(self, opened: OpenRound, action: Send, now: float) -> None:
        match action.directive:
            case Plan(round=number, batches=batches) if number == opened.round:
                track = opened.tracks.get(action.to.peer)
                if track is not None:
                    track.plan = batches
                    self._look_at_plan(track, now)
            case CloseRound():
                opened.server_track.switch("outer-step", now)

    def _acted(self, opened: OpenRound, action: object, now: float) -> None:
        match action:
            case Drop(peer=peer, kind=kind, reason=reason):
                self._gone(opened, peer, kind, now)
                self._fault(opened, now, peer, "replaced", reason)
            case LetGo(peer=peer, kind=kind, reason=reason):
                self._gone(opened, peer, kind, now)
                self._fault(opened, now, peer, "left", reason)
            case Again(peer=peer, reason=reason):
                self._fault(opened, now, peer, "executor started again", reason)
            case Restart(reason=reason):
                opened.server_track.switch(None, now)
                for track in opened.tracks.values():
                    track.switch(None, now)
                self._fault(opened, now, opened.server, "parameter server lost", reason)
            case Fail(error=error):
                self._fault(opened, now, "", "job failed", str(error))

    def _applied(self, opened: OpenRound, entry: LedgerRound, noted: JournalEntry, now: float) -> None:
        opened.server_track.switch("broadcast", now)
        self._put(with_numbers(opened.record(now), entry))
        if not _goes_on(noted):
            self._open = None
            return
        following = self._begin(entry.round + 1, now)
        following.server = opened.server
        following.server_track.switch("broadcast", now)
        for peer, track in opened.tracks.items():
            if track.kind is None:
                continue
            kept = following.tracks[peer] = Track()
            loading = track.kind == "loading"
            kept.switch("loading" if loading else "training" if peer in self._early else "waiting", now)
        self._early.clear()
        self._open = following
        self._look_at_broadcast(following, now)

    def _put(self, record: RoundRecord, key: Key | None = None) -> None:
        key = key or record.key
        self.number += 1
        self._records[key] = record
        self._changed.pop(key, None)
        self._changed[key] = self.number
        self._unsaved.append(record)
        del self._unsaved[:-KEPT]
        self._trim()
        self.finished.note()

    def _trim(self) -> None:
        parts = sum(len(record.workers) for record in self._records.values())
        while len(self._records) > 1 and (len(self._records) > KEPT or parts > KEPT_PARTS):
            key = next(iter(self._records))
            parts -= len(self._records.pop(key).workers)
            self._changed.pop(key, None)
        for key in list(self._records)[:-DETAILED]:
            record = self._records[key]
            if record.server_spans or any(worker.spans for worker in record.workers):
                self._records[key] = without_spans(record)

    def _look_at_plan(self, track: Track, now: float) -> None:
        if track.kind == "training" and track.plan is not None and track.batches >= track.plan:
            track.switch("sending", now)

    def _look_at_broadcast(self, opened: OpenRound, now: float) -> None:
        """It has theta sent to everybody once nobody waits for it any more."""
        if opened.server_track.kind == "broadcast" and not any(
            track.kind == "waiting" for track in opened.tracks.values()
        ):
            opened.server_track.switch("collecting", now)

    def _gone(self, opened: OpenRound, peer: str, kind: ExecutorClass, now: float) -> None:
        if kind == "train" and peer in opened.tracks:
            opened.tracks[peer].switch(None, now)
        elif kind == "aggregate" and peer == opened.server:
            opened.server_track.switch(None, now)

    def _fault(self, opened: OpenRound, now: float, peer: str, what: str, text: str) -> None:
        if len(opened.faults) < _MAX_FAULTS:
            opened.faults.append(self._clean(Fault(rounded(now - opened.at), peer, what, text)))

    def _clean(self, fault: Fault) -> Fault:
        """Without secrets, short, and text that can be written."""
        what, text = (self._clean_text(one) for one in (fault.what, fault.text))
        return msgspec.structs.replace(fault, what=what, text=text)

    def _clean_text(self, text: str) -> str:
        if self._redact is not None:
            text = self._redact(text)
        # shortened last: half a secret would not be recognised. File names may hold lone surrogates.
        return text[:_MAX_TEXT].encode("utf-8", "replace").decode()


def _goes_on(entry: JournalEntry) -> bool:
    """Whether the machine still trains."""
    state = entry.state
    return not isinstance(state, str) and state.get("phase") not in ("exporting", "done", "failed")

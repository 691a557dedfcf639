"""The next slices are here before the current one ends: one prefetcher a training job.

It asks the scheduler for a slice, takes it from the cache or from one of its providers in turn, and holds
it until the executor asks. At least one is held; where slices are short, as many as the executor uses in
``prefetch_s`` seconds, so that it trains on while the scheduler or a data node is away. It never gives up by
itself: a scheduler or provider that is away is asked again, with pauses, until the job ends. A provider that
sends nothing for a while is left for another one, which goes on where it stopped, and is tried last from then
on.

When the job goes on from a theta that this worker's work is not in, the scheduler has taken back the slices
it had assigned until then. What was asked for before is then dropped here too, and nothing is handed out
until the executor has reported that it started over (:meth:`SlicePrefetcher.start_over`, ``resume``), so that
it cannot mistake a new slice for one to drop. Each slice tells under which round, and which attempt at it, it
was asked for.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import trio

from hypha.backoff import Backoff
from hypha.errors import NetworkError, Refused, TransferCorrupt
from hypha.messages import (
    FetchedFile,
    JobStamp,
    NextSlice,
    NoSlice,
    PeerRef,
    PullFile,
    Request,
    Response,
    SliceAssigned,
    TransferMeta,
)
from hypha.net.bulk.files import hash_file
from hypha.node import Changes, Transfers
from hypha.runtime import in_thread
from hypha.telemetry.instruments import CACHE_LOOKUPS, FETCH_DURATION
from hypha.tracing import Attribute, span
from hypha.tracing.operations import FETCH_SLICE
from hypha.waiting import Reminder, in_words
from hypha.worker.slices.cache import SliceCache
from hypha.worker.slices.manifest_check import ManifestCheck

logger = logging.getLogger("hypha.worker.slices")

#: Slices whose files stay in the job directory; the executor has long read older ones.
KEPT_LINKS = 16
FIRST_RETRY_S, MAX_RETRY_S = 0.25, 30.0
#: While no provider can be pulled from: training stands still, and one may be back at any moment.
MAX_PULL_RETRY_S = 5.0
MAX_HOLD_S = 10.0
#: Slices held for the executor, however short they are.
MAX_AHEAD = 32
#: The pace at which slices are used is the median time between so many, and known from a few on.
_PACES = 9
_LEAST_PACES = 3
#: With another provider at hand, one that sends nothing is left after this; doubled each time, as all may be
#: busy with others.
STILL_S = 2.0
#: It is tried last for so long.
AVOID_S = 30.0


@dataclass(frozen=True)
class SliceDemand:
    """Which slices an executor needs: those of ``dataset``, for as many as last ``prefetch_s`` seconds of
    training, or one, in ``directory``, a part of the job's. ``stamp`` gives the job's current one,
    ``trace_of`` the trace of what is requested under a stamp.
    """

    dataset: str
    incarnation: str
    directory: Path
    stamp: Callable[[], JobStamp]
    trace_of: Callable[[JobStamp], str | None] = lambda stamp: None
    prefetch_s: float = 0.0


class SlicePrefetcher:
    """Meets ``demand``; ``ask`` asks the job's scheduler. What ``manifest`` does not know is not used."""

    def __init__(
        self,
        ask: Callable[[Request], Awaitable[Response]],
        transfers: Transfers,
        cache: SliceCache,
        demand: SliceDemand,
        manifest: ManifestCheck | None = None,
    ) -> None:
        self._ask = ask
        self._transfers = transfers
        self._cache = cache
        self._demand = demand
        self._manifest = manifest
        self._seq = 0
        #: what was got for an earlier one is dropped
        self._held_from = 0
        self._generations = Changes()
        self._ready: deque[FetchedFile] = deque()
        #: the scheduler allows so many, lest few workers hold a small dataset
        self._allowed = 1
        #: when slices were handed out
        self._used_at: deque[float] = deque(maxlen=_PACES + 1)
        self._avoided: dict[str, float] = {}
        self._changed = Changes()
        self._handed_out: list[Path] = []
        self._asking: trio.CancelScope | None = None
        self._held: trio.Event | None = None
        self._pending = demand.stamp()

    async def run(self) -> None:
        while True:
            while not self._wants_more():
                await self._changed.wait()
            found = await self._fetch_next()
            self._asking = None
            if found is not None:
                self._ready.append(found)
                self._changed.note()

    async def next(self) -> FetchedFile:
        """The next slice, in the job directory; waits while there is none. A cancelled call takes none."""
        while not self._ready or self._held is not None:
            if self._held is None:
                await self._changed.wait()
            else:
                # An executor that cannot listen while it waits here must not wait for ever.
                with trio.move_on_after(MAX_HOLD_S):
                    await self._held.wait()
                self._held = None
        found = self._ready.popleft()
        self._used_at.append(trio.current_time())
        self._changed.note()
        self._handed_out.append(self._place(found))
        while len(self._handed_out) > KEPT_LINKS:
            self._handed_out.pop(0).unlink(missing_ok=True)
        return found

    def start_over(self) -> None:
        """Drop what was asked for so far, and hand out nothing until :meth:`resume`."""
        if self._held is None:
            self._held = trio.Event()
        self._held_from = self._seq + 1
        while self._ready:
            self._place(self._ready.popleft()).unlink(missing_ok=True)
        if self._asking is not None:
            self._asking.cancel()
        self._changed.note()

    def _place(self, found: FetchedFile) -> Path:
        return self._demand.directory.parent / found.path

    def begin_generation(self) -> None:
        """The job goes on in another generation: what is asked for is asked for in that one."""
        self._pending = self._demand.stamp()
        self._generations.note()

    def resume(self) -> None:
        """The executor has started the round it goes on from."""
        if self._held is not None:
            self._held.set()
            self._held = None

    def _wants_more(self) -> bool:
        """One is always wanted; more while they are for less than the time to be covered, and fit."""
        if not self._ready:
            return True
        times = list(self._used_at)
        paces = [later - earlier for earlier, later in pairwise(times)]
        if len(paces) < _LEAST_PACES:
            return False
        wanted = min(math.ceil(self._demand.prefetch_s / max(statistics.median(paces), 1e-3)), MAX_AHEAD)
        held_bytes = sum(one.size for one in self._ready)
        fits = held_bytes + self._ready[-1].size <= self._cache.max_bytes // 2
        return fits and len(self._ready) < min(wanted, self._allowed)

    async def _fetch_next(self) -> FetchedFile | None:
        """None when it was dropped meanwhile."""
        self._seq += 1
        self._pending = self._demand.stamp()
        parent = self._demand.trace_of(self._pending)
        attributes: dict[str, Attribute] = {"hypha.job": self._pending.job_id}
        attributes["hypha.round"] = self._pending.round
        with trio.CancelScope() as scope, span(FETCH_SLICE, attributes, parent=parent) as fetching:
            self._asking = scope
            backoff = Backoff(FIRST_RETRY_S, MAX_PULL_RETRY_S)
            logged = ""
            patience_s = STILL_S
            while True:
                assigned = await self._ask_until_assigned()
                self._allowed = assigned.ahead
                fetching.set_attributes({"hypha.dataset": assigned.dataset, "hypha.slice": assigned.index})
                path = (
                    self._demand.directory / f"{self._seq:06}-{assigned.epoch}-{assigned.index}.safetensors"
                )
                try:
                    known = self._manifest is None or await self._manifest.knows(assigned)
                    if known and (
                        await self._take_cached(assigned, path)
                        or await self._pull(assigned, path, patience_s)
                    ):
                        if scope.cancel_called:
                            # dropped after the last moment at which trio could have raised it
                            path.unlink(missing_ok=True)
                            return None
                        # requested while the newest theta was that of this stamp
                        stamp = self._pending
                        return FetchedFile(
                            path=f"{path.parent.name}/{path.name}",
                            size=assigned.size,
                            slice=assigned,
                            round=stamp.round,
                            attempt=stamp.attempt,
                            generation=stamp.generation,
                        )
                except (OSError, ValueError) as exc:  # the disk, or a hash that is none
                    if str(exc) != logged:
                        logged = str(exc)
                        text = "Slice %d of %s cannot be stored: %s"
                        logger.error(text, assigned.index, assigned.dataset, exc)
                # Providers may come and go, so ask again; the same seq gets the same slice.
                patience_s *= 2.0
                await trio.sleep(backoff.next_s())
        return None

    async def _ask_until_assigned(self) -> SliceAssigned:
        backoff, reminder, began = Backoff(FIRST_RETRY_S, MAX_RETRY_S), Reminder(), trio.current_time()
        while True:
            request = NextSlice(
                stamp=self._pending,
                incarnation=self._demand.incarnation,
                seq=self._seq,
                cached=self._cache.cached(self._demand.dataset),
                held_from=self._held_from,
            )
            try:
                answer = await self._ask(request)
            except NetworkError as exc:
                pause_s = backoff.next_s()
                logger.warning("The scheduler gave no slice: %s. Asking again in %.1f s.", exc, pause_s)
                # a scheduler that comes back reports so
                with trio.move_on_after(pause_s):
                    await self._generations.wait()
                continue
            if isinstance(answer, SliceAssigned):
                return answer
            backoff.reset()
            if reminder.due():
                logger.info(
                    "Waiting for a slice of %s since %s: the scheduler has none to give now (%s).",
                    self._demand.dataset,
                    in_words(trio.current_time() - began),
                    answer.reason if isinstance(answer, NoSlice) else type(answer).__name__,
                )
            wait_s = answer.retry_in_s if isinstance(answer, NoSlice) else MAX_RETRY_S
            # The round may move on while there is nothing: then this is no longer a request of the old one.
            self._pending = self._demand.stamp()
            # a comparison with NaN is always False
            await trio.sleep(min(max(wait_s, 0.05), MAX_RETRY_S) if wait_s >= 0 else MAX_RETRY_S)

    async def _take_cached(self, assigned: SliceAssigned, path: Path) -> bool:
        """Put the slice at ``path`` if it is here, and still what was pulled."""
        hit = self._cache.link(assigned, path)
        if hit:
            # to its end, so that a link is never forgotten
            with trio.CancelScope(shield=True):
                found = await in_thread(hash_file, path)
            if found != (assigned.size, assigned.blake3):
                self._cache.drop(assigned, path)
                hit = False
        CACHE_LOOKUPS.add(result="hit" if hit else "miss")
        logger.debug(
            "Slice %d of epoch %d was assigned: %s.",
            assigned.index,
            assigned.epoch,
            "it is in the cache" if hit else "it is to be fetched",
            extra={"dataset": assigned.dataset},
        )
        return hit

    async def _pull(self, assigned: SliceAssigned, path: Path, patience_s: float) -> bool:
        """Have one of the providers send it, whole; False when none did."""
        name = f"{assigned.dataset}/{assigned.index}"
        expect = TransferMeta(kind="slice", name=name, size=assigned.size, blake3=assigned.blake3)
        incoming, began = self._cache.incoming(assigned), trio.current_time()
        self._cache.require_space(assigned.size)
        what = PullFile(kind="slice", name=name, job_id=self._demand.stamp().job_id)
        still_s = patience_s if len(assigned.providers) > 1 else None
        for provider in self._in_order(assigned.providers):
            fields = {"peer_id": provider.peer, "dataset": assigned.dataset}
            try:
                await self._transfers.pull(provider, what, incoming, expect, assigned.size, still_s)
            except TransferCorrupt as exc:
                text = "Data node %s sent a corrupt slice %s: %s"
                logger.error(text, provider.peer, name, exc, extra=fields)
            except Refused as exc:
                logger.warning("Data node %s: no slice %s: %s", provider.peer, name, exc, extra=fields)
            except NetworkError as exc:
                logger.warning("Slice %s could not be pulled: %s", name, exc, extra=fields)
            else:
                lasted_s = trio.current_time() - began
                FETCH_DURATION.record(lasted_s, status="success")
                text = "Slice %s was fetched within %.3f s: %d bytes."
                logger.debug(text, name, lasted_s, assigned.size, extra=fields)
                self._avoided.pop(provider.peer, None)
                self._cache.insert(assigned, incoming)
                return self._cache.link(assigned, path)
            self._avoided[provider.peer] = trio.current_time() + AVOID_S
        FETCH_DURATION.record(trio.current_time() - began, status="failure")
        return False

    def _in_order(self, providers: tuple[PeerRef, ...]) -> list[PeerRef]:
        """As the scheduler named them, those that failed lately last, the longest ago first."""
        now = trio.current_time()
        self._avoided = {peer: until for peer, until in self._avoided.items() if until > now}
        return sorted(providers, key=lambda provider: self._avoided.get(provider.peer, 0.0))

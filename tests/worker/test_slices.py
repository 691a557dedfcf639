"""The prefetcher against a scripted scheduler and scripted data nodes, under a virtual clock."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from tests.support.signals import Signals
from tests.worker.test_cache import assigned, content

from hypha.config.models import CacheConfig
from hypha.errors import PeerUnreachable, Refused, TransferCorrupt, TransferFailed
from hypha.messages import (
    DatasetDescription,
    DescribeDataset,
    FetchedFile,
    JobStamp,
    Manifest,
    NextSlice,
    NoSlice,
    PeerRef,
    PullFile,
    Request,
    Response,
    SliceAssigned,
    SliceInfo,
    TransferMeta,
)
from hypha.rules.manifests import manifest_hash
from hypha.telemetry import instruments as metrics
from hypha.tracing import round_traceparent
from hypha.worker.slices.cache import SliceCache
from hypha.worker.slices.manifest_check import ManifestCheck
from hypha.worker.slices.prefetching import (
    AVOID_S,
    KEPT_LINKS,
    MAX_AHEAD,
    MAX_HOLD_S,
    STILL_S,
    SliceDemand,
    SlicePrefetcher,
)


def index_of(found: FetchedFile) -> int:
    assert found.slice is not None
    return found.slice.index


class World:
    """A scheduler that hands out slices 0, 1, 2, ... from ``providers`` which fail as told."""

    def __init__(
        self,
        tmp_path: Path,
        providers: tuple[str, ...] = ("a", "b"),
        prefetch_s: float = 0.0,
        max_gb: float = 20.0,
    ) -> None:
        self.cache = SliceCache(tmp_path / "cache", CacheConfig(max_slices=4, max_gb=max_gb))
        self.directory = tmp_path / "slices"
        self.directory.mkdir()
        self.providers = tuple(PeerRef(peer=name) for name in providers)
        self.round = 0
        self.asked: list[NextSlice] = []
        self.pulled: list[tuple[str, str]] = []
        self.troubles: dict[str, Exception] = {}
        self.silent: set[str] = set()
        self.ahead = 1
        #: called when a pull is complete, after its last checkpoint
        self.at_the_end: Callable[[], None] | None = None
        self.answers: list[Response | Exception] = []
        self.slices = 1000
        self.prefetcher = SlicePrefetcher(self.ask, self, self.cache, self.demand(prefetch_s=prefetch_s))

    def place(self, found: FetchedFile) -> Path:
        return self.directory.parent / found.path

    def demand(self, **more: Any) -> SliceDemand:
        return SliceDemand("digits", "incarnation", self.directory, self.stamp, **more)

    def stamp(self) -> JobStamp:
        return JobStamp(job_id="job", generation=1, round=self.round)

    async def ask(self, request: Request) -> Response:
        assert isinstance(request, NextSlice)
        self.asked.append(request)
        await trio.sleep(0.01)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        return self.slice((request.seq - 1) % self.slices)

    def slice(self, index: int) -> SliceAssigned:
        part = assigned(index)
        return SliceAssigned(
            dataset=part.dataset, index=index, epoch=0, samples=1, size=part.size, blake3=part.blake3,
            providers=self.providers, ahead=self.ahead,
        )  # fmt: skip

    async def pull(
        self,
        peer: PeerRef,
        request: PullFile,
        destination: Path,
        expect: TransferMeta | None,
        max_bytes: int,
        still_s: float | None = None,
    ) -> TransferMeta:
        what = request
        self.pulled.append((peer.peer, what.name))
        await trio.sleep(0.1)
        if peer.peer in self.silent:
            if still_s is None:
                await trio.sleep_forever()
            await trio.sleep(still_s)
            raise TransferFailed(peer.peer, what.name, "nothing came")
        if peer.peer in self.troubles:
            raise self.troubles[peer.peer]
        assert expect is not None
        assert what.kind == "slice"
        assert max_bytes == expect.size
        # not in a thread: the virtual clock would run on meanwhile
        destination.write_bytes(content(int(what.name.partition("/")[2])))
        if self.at_the_end is not None:
            self.at_the_end()
        return expect

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SlicePrefetcher]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.prefetcher.run)
            yield self.prefetcher
            nursery.cancel_scope.cancel()


async def test_next_slice_is_here_before_the_current_one_ends(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as prefetcher:
        first = await prefetcher.next()
        assert world.place(first).read_bytes() == content(0)
        assert world.place(first).parent == world.directory
        await trio.sleep(1)  # the executor trains; one slice is fetched ahead, no more
        assert [request.seq for request in world.asked] == [1, 2]
        before = trio.current_time()
        assert index_of(await prefetcher.next()) == 1
        assert trio.current_time() == before
    assert world.asked[0] == NextSlice(stamp=world.stamp(), incarnation="incarnation", seq=1)
    assert world.asked[1].cached == (0,)


async def use(prefetcher: SlicePrefetcher, count: int, pace_s: float) -> None:
    """As an executor that needs ``pace_s`` for a slice."""
    for _ in range(count):
        await prefetcher.next()
        await trio.sleep(pace_s)


@pytest.mark.parametrize(
    ("pace_s", "prefetch_s", "ahead", "max_gb", "held"),
    [
        (0.5, 5.0, 100, 20.0, 10),  # what is used in that time
        (20.0, 5.0, 100, 20.0, 1),  # the next one, however long a slice lasts
        (0.5, 0.0, 100, 20.0, 1),
        (0.5, 5.0, 4, 20.0, 4),  # the scheduler's limit
        (0.01, 1000.0, 100, 20.0, MAX_AHEAD),
        (0.5, 5.0, 100, 12 * len(content(0)) / 1e9, 6),  # half of the cache's bytes
    ],
)
async def test_slices_for_some_time_are_fetched_ahead(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    pace_s: float,
    prefetch_s: float,
    ahead: int,
    max_gb: float,
    held: int,
) -> None:
    world = World(tmp_path, prefetch_s=prefetch_s, max_gb=max_gb)
    world.ahead = ahead
    async with world.running() as prefetcher:
        await use(prefetcher, 20, pace_s)
        # one that is not asked for slices fetches no more than that
        await trio.sleep(100.0)
        assert world.asked[-1].seq - 20 == held


async def test_training_goes_on_while_the_scheduler_is_away(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path, prefetch_s=6.0)
    world.ahead = 100
    async with world.running() as prefetcher:
        await use(prefetcher, 20, 0.5)
        world.answers = [PeerUnreachable("scheduler", "cut off")] * 100
        before = trio.current_time()
        await use(prefetcher, 11, 0.5)
        assert trio.current_time() - before == pytest.approx(5.5)


async def test_what_was_fetched_ahead_is_dropped_with_the_rest(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path, prefetch_s=5.0)
    world.ahead = 100
    async with world.running() as prefetcher:
        await use(prefetcher, 20, 0.5)
        await trio.sleep(10.0)
        asked = world.asked[-1].seq
        prefetcher.start_over()
        assert len(list(world.directory.iterdir())) <= KEPT_LINKS
        prefetcher.resume()
        found = await prefetcher.next()
        assert index_of(found) == asked
    assert world.asked[asked].held_from == asked + 1


async def test_a_silent_provider_is_left_and_then_tried_last(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    world.silent = {"a"}
    async with world.running() as prefetcher:
        before = trio.current_time()
        for _ in range(3):
            await prefetcher.next()
        assert trio.current_time() - before < STILL_S + 1.0
        assert [peer for peer, _ in world.pulled[:4]] == ["a", "b", "b", "b"]
        await trio.sleep(AVOID_S)
        world.silent = {"b"}
        for _ in range(3):
            await prefetcher.next()
        assert [peer for peer, _ in world.pulled[5:]][:2] == ["a", "a"]


async def test_the_only_provider_is_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Leaving it would begin the same wait anew."""
    world = World(tmp_path, providers=("a",))
    world.silent = {"a"}
    async with world.running() as prefetcher:
        with trio.move_on_after(60.0):
            await prefetcher.next()
        assert world.pulled == [("a", "digits/0")]


async def test_a_slice_dropped_as_it_arrives_is_not_handed_out(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The transfer has ended, so cancelling comes too late: it must be dropped all the same."""
    world = World(tmp_path)

    def drop() -> None:
        world.at_the_end = None
        world.prefetcher.start_over()
        world.prefetcher.resume()

    world.at_the_end = drop
    async with world.running() as prefetcher:
        assert index_of(await prefetcher.next()) == 1
    assert [request.seq for request in world.asked][:2] == [1, 2]


async def test_cached_slices_are_not_pulled_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    world.slices = 2
    async with world.running() as prefetcher:
        for _ in range(6):
            await prefetcher.next()
    assert len(world.pulled) == 2


async def test_other_provider_after_each_kind_of_failure(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    for number, trouble in enumerate(
        [
            TransferCorrupt("a", "slice", "other hash"),
            TransferFailed("a", "slice", "cut"),
            PeerUnreachable("a", "down"),
            Refused("not-found", "no such dataset", "a"),
        ]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        world = World(place)
        world.troubles["a"] = trouble
        async with world.running() as prefetcher:
            assert world.place(await prefetcher.next()).read_bytes() == content(0)
        assert world.pulled[:2] == [("a", "digits/0"), ("b", "digits/0")]


async def test_no_provider_means_patience_and_the_same_question(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    world.troubles = {name: PeerUnreachable(name, "down") for name in "ab"}
    async with world.running() as prefetcher:
        await trio.sleep(120)
        assert {request.seq for request in world.asked} == {1}
        assert 5 < len(world.asked) < 40
        world.troubles.clear()
        assert index_of(await prefetcher.next()) == 0


async def test_scheduler_that_is_away_or_has_nothing(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    world.answers = [
        PeerUnreachable("scheduler", "restarting"),
        Refused("busy", "later"),
        NoSlice(retry_in_s=7.0, reason="all are with others"),
        NoSlice(retry_in_s=math.nan, reason="never"),
        NoSlice(retry_in_s=-1.0, reason="at once"),
    ]
    async with world.running() as prefetcher:
        before = trio.current_time()
        assert index_of(await prefetcher.next()) == 0
        assert trio.current_time() - before > 7.0
    assert [request.seq for request in world.asked[:6]] == [1] * 6


async def test_disk_that_is_full_is_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    world.troubles["a"] = OSError(28, "No space left on device")
    async with world.running() as prefetcher:
        await trio.sleep(5)
        assert len(world.asked) > 2
        world.troubles.clear()
        assert index_of(await prefetcher.next()) == 0


async def test_starting_over_drops_what_was_asked_for_before(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as prefetcher:
        assert (await prefetcher.next()).round == 0
        await trio.sleep(1)  # slice 1 is ready
        world.round = 1
        prefetcher.start_over()
        before = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def resume() -> None:
                await trio.sleep(3)
                prefetcher.resume()

            nursery.start_soon(resume)
            found = await prefetcher.next()
        assert trio.current_time() - before >= 3
        assert (index_of(found), found.round) == (2, 1)
        # in the middle of a pull, too
        await trio.sleep(0.05)
        world.round = 2
        prefetcher.start_over()
        prefetcher.resume()
        found = await prefetcher.next()
        assert (index_of(found), found.round) == (4, 2)
        assert world.asked[-1].stamp.round == 2
    assert len(list(world.directory.iterdir())) == 3


async def test_executor_that_cannot_listen_while_it_fetches_is_not_held_for_ever(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(tmp_path)
    async with world.running() as prefetcher:
        await trio.sleep(1)
        prefetcher.start_over()
        with trio.fail_after(MAX_HOLD_S + 1):
            assert index_of(await prefetcher.next()) == 1


async def test_disk_stays_flat(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    world = World(tmp_path)
    world.slices = 200
    async with world.running() as prefetcher:
        for _ in range(50):
            await prefetcher.next()
    assert len(list(world.directory.iterdir())) <= KEPT_LINKS + 1
    assert len(world.cache) == 4


async def test_a_cached_slice_that_rotted_is_pulled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)
    world.slices = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.prefetcher.run)
        await world.prefetcher.next()
        await world.prefetcher.next()
        assert len(world.pulled) == 1, "the cache was of no use"
        (kept,) = (tmp_path / "cache").glob("*.safetensors")
        before = len(world.asked)
        kept.chmod(0o600)
        data = bytearray(kept.read_bytes())
        data[len(data) // 2] ^= 1
        kept.write_bytes(data)
        # what was linked before is the same file; only what is asked for from now on is checked
        while len(world.asked) <= before:
            await world.prefetcher.next()
        found = await world.prefetcher.next()
        assert world.place(found).read_bytes() == content(0)
        assert len(world.pulled) == 2
        nursery.cancel_scope.cancel()
    assert "Look at the disk" in caplog.text


async def test_two_thetas_in_a_row_that_a_worker_is_not_in_drop_its_slices_twice(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with World(tmp_path).running() as prefetcher:
        first = await prefetcher.next()
        prefetcher.start_over()
        prefetcher.start_over()
        prefetcher.resume()
        assert index_of(await prefetcher.next()) > index_of(first)


async def test_a_slice_is_a_span_and_a_duration_and_the_cache_is_counted(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, signals: Signals
) -> None:
    world = World(tmp_path)
    world.slices = 1
    world.troubles["a"] = PeerUnreachable("a", "it is down")
    world.prefetcher = SlicePrefetcher(
        world.ask,
        world,
        world.cache,
        world.demand(
            trace_of=lambda stamp: round_traceparent(stamp.job_id, stamp.generation, stamp.round, 1.0)
        ),
    )
    async with world.running() as prefetcher:
        await prefetcher.next()
        world.round = 1
        await prefetcher.next()
        await trio.sleep(1)
    first, *later = signals.spans("Fetch slice")
    assert first.parent is not None
    assert first.context is not None
    round_0 = round_traceparent("job", 1, 0, 1.0)
    assert f"00-{first.parent.trace_id:032x}-{first.parent.span_id:016x}-01" == round_0
    attributes = dict(first.attributes or {})
    assert attributes == {"hypha.job": "job", "hypha.round": 0, "hypha.dataset": "digits", "hypha.slice": 0}
    assert later
    # the second provider had it; from then on it was in the cache
    assert signals.reading(metrics.FETCH_DURATION, status="success") == 1
    assert signals.reading(metrics.FETCH_DURATION, status="failure") == 0
    assert signals.reading(metrics.CACHE_LOOKUPS, result="miss") == 1
    assert signals.reading(metrics.CACHE_LOOKUPS, result="hit") >= 1


async def test_a_slice_that_nobody_can_send_is_counted_as_a_failure(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, signals: Signals
) -> None:
    world = World(tmp_path)
    world.troubles = {name: PeerUnreachable(name, "it is down") for name in ("a", "b")}
    async with world.running():
        await trio.sleep(0.5)
    assert signals.reading(metrics.FETCH_DURATION, status="failure") >= 1
    assert signals.reading(metrics.FETCH_DURATION, status="success") == 0


async def test_a_long_wait_for_a_slice_is_told_once_a_minute(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    world, began = World(tmp_path), trio.current_time()
    world.answers = [NoSlice(reason="none-left", retry_in_s=5.0) for _ in range(60)]
    with caplog.at_level("INFO", "hypha.worker"):
        async with world.running() as prefetcher:
            await prefetcher.next()
    told = [one for one in caplog.messages if "Waiting for a slice of digits since" in one]
    assert len(world.asked) > 50
    assert 0 < len(told) <= (trio.current_time() - began) / 60.0


def manifest_of(world: World, count: int = 8) -> Manifest:
    parts = [world.slice(index) for index in range(count)]
    return Manifest(
        name="digits",
        columns=(),
        slices=tuple(
            SliceInfo(file=f"{one.index}", samples=one.samples, size=one.size, blake3=one.blake3)
            for one in parts
        ),
    )


@pytest.mark.parametrize("trouble", ["", "other manifest", "silent"])
async def test_a_slice_that_is_not_in_the_manifest_is_not_used(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
    trouble: str,
) -> None:
    """Whoever assigns it: the manifest is asked for at a data node, and its hash is computed here."""
    world = World(tmp_path)
    manifest = manifest_of(world)
    described: list[str] = []

    async def request(peer: PeerRef, request: Request, timeout_s: float) -> Response:
        described.append(peer.peer)
        assert request == DescribeDataset(dataset="digits")
        if peer.peer == "a" and trouble == "silent":
            raise PeerUnreachable("a", "it is gone")
        if peer.peer == "a" and trouble:
            return DatasetDescription(manifest=manifest_of(world, 3), manifest_hash=manifest_hash(manifest))
        return DatasetDescription(manifest=manifest, manifest_hash="what it says is not asked")

    check = ManifestCheck(request, "digits", manifest_hash(manifest))
    world.prefetcher = SlicePrefetcher(world.ask, world, world.cache, world.demand(), check)
    good = world.slice(0)
    world.answers = [
        msgspec.structs.replace(good, samples=2),
        msgspec.structs.replace(good, blake3=world.slice(1).blake3, size=world.slice(1).size),
        msgspec.structs.replace(good, index=8),
        good,
    ]
    async with world.running():
        found = await world.prefetcher.next()
        assert found.slice == good
    assert caplog.text.count("is not in the manifest") == 3
    # once: all slices are known then
    assert described == (["a", "b"] if trouble else ["a"])
    assert ("Data node a does not serve digits as the job says" in caplog.text) is (
        trouble == "other manifest"
    )


async def test_where_no_data_node_says_what_the_manifest_is_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path)

    async def request(peer: PeerRef, request: Request, timeout_s: float) -> Response:
        raise PeerUnreachable(peer.peer, "it is busy")

    check = ManifestCheck(request, "digits", "a" * 64)
    assert await check.knows(world.slice(0))
    assert await check.knows(world.slice(1))
    assert caplog.text.count("The manifest of digits cannot be checked yet") == 1
    # a scheduler of an earlier version names none
    assert await ManifestCheck(request, "digits", "").knows(world.slice(0))

"""Caps of the line: the bucket by its arithmetic, whole transfers by the clock."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import trio
from tests.support.network import Network, until

from hypha.config.tuning import HoursConfig, LimitsConfig
from hypha.messages import Health, TransferMeta
from hypha.net.bandwidth import (
    CREDIT_S,
    LEAST_PORTION_BYTES,
    LOOK_S,
    MOST_PORTION_BYTES,
    WORD_BYTES,
    Bucket,
    Cap,
    Caps,
)
from hypha.net.bulk.transfers import meta_of

MBIT = 1e6 / 8


@dataclass
class Line:
    """Moves portions of several transfers through one bucket, by a clock of its own; waits end late."""

    bucket: Bucket
    late_s: float = 0.0
    now: float = 0.0
    moved: dict[str, int] = field(default_factory=dict)

    def run(self, names: list[str], until: float) -> None:
        due = dict.fromkeys(names, self.now)
        while True:
            name = min(due, key=lambda one: due[one])
            if due[name] > until:
                self.now = until
                return
            self.now = max(self.now, due[name])
            self.moved[name] = self.moved.get(name, 0) + self.bucket.portion
            wait_s = self.bucket.take(self.bucket.portion, self.now)
            due[name] = self.now + (wait_s + self.late_s if wait_s else 0.0)


@pytest.mark.parametrize("mbit", [0.5, 5.0, 100.0])
@pytest.mark.parametrize("late_s", [0.0, 0.01])
def test_what_moves_is_the_rate_and_no_more(mbit: float, late_s: float) -> None:
    line = Line(Bucket(mbit * MBIT), late_s)
    line.run(["a"], until=60.0)
    moved = sum(line.moved.values())
    most = mbit * MBIT * (60.0 + CREDIT_S) + line.bucket.portion
    assert 0.99 * mbit * MBIT * 60.0 <= moved <= most


def test_transfers_have_equal_shares() -> None:
    line = Line(Bucket(10 * MBIT))
    # with which one of them begins
    burst = 3 * line.bucket.portion
    line.run(["a", "b", "c"], until=30.0)
    assert max(line.moved.values()) - min(line.moved.values()) <= burst
    # one that comes later has its share from its first portion on
    line.moved.clear()
    line.run(["a", "b", "c", "d"], until=60.0)
    assert max(line.moved.values()) - min(line.moved.values()) <= burst


def test_an_idle_line_saves_nothing_up() -> None:
    bucket = Bucket(1 * MBIT)
    assert bucket.take(1000, 0.0) == 0.0
    # a second later a tenth of a second's bytes go at once, and the next wait
    assert bucket.take(int(CREDIT_S * MBIT), 1.0) == pytest.approx(0.0, abs=1e-4)
    assert bucket.take(int(MBIT), 1.0) == pytest.approx(1.0, rel=1e-3)


def test_portions_have_bounds() -> None:
    assert Bucket(10_000.0).portion == LEAST_PORTION_BYTES
    assert Bucket(1e9).portion == MOST_PORTION_BYTES
    assert Bucket(10 * MBIT).portion == 62500


def test_a_change_of_the_rate_counts_from_then_on() -> None:
    bucket = Bucket(1000.0)
    assert bucket.take(2100, 0.0) == pytest.approx(2.0)
    bucket.set_rate(2000.0, 0.0)
    assert bucket.take(0, 0.0) == pytest.approx(1.0)
    bucket.set_rate(10.0, 0.0)
    assert bucket.take(0, 0.0) == pytest.approx(1.0)
    bucket.set_rate(None, 0.0)
    assert bucket.take(10**9, 0.0) == 0.0
    bucket.set_rate(1000.0, 5.0)
    assert bucket.take(100, 5.0) == pytest.approx(0.0)


def test_a_cap_follows_the_hours_of_the_day() -> None:
    limits = LimitsConfig(
        upload_mbit=40,
        schedule=[
            HoursConfig(start="08:00", to="18:00", upload_mbit=4, days=["mon", "tue"]),
            HoursConfig(start="22:00", to="06:00", upload_mbit=100, download_mbit=7),
        ],
    )
    monday, wednesday = 0, 2
    assert limits.at(monday, 7 * 60 + 59.9) == (40, None)
    assert limits.at(monday, 8 * 60) == (4, None)
    assert limits.at(monday, 18 * 60) == (40, None)
    assert limits.at(wednesday, 12 * 60) == (40, None)
    assert limits.at(wednesday, 23 * 60) == (100, 7) == limits.at(wednesday, 0)
    assert limits.at(wednesday, 6 * 60) == (40, None)
    assert limits.caps_download
    night = HoursConfig(start="22:00", to="06:00", days=["mon"])
    assert night.holds(0, 23 * 60)
    assert night.holds(1, 60)
    assert not night.holds(0, 60)

    clock = {"now": 100.0, "hour": 7}
    caps = Caps(limits, today=lambda: datetime(2026, 11, 30, clock["hour"]))  # type: ignore[arg-type]
    assert caps.up is not None
    assert caps.details() == {"bandwidth": "sent 40 Mbit/s, received as much as goes"}
    cap = Cap("outbound", caps.up._rate_now, clock=lambda: clock["now"])
    assert cap.portion == int(40 * MBIT * 0.05)
    clock["hour"] = 9
    assert cap.owed_s(0) == 0.0
    assert cap.portion == int(40 * MBIT * 0.05), "the schedule is looked at once in a while only"
    clock["now"] += LOOK_S
    cap.owed_s(0)
    assert cap.portion == int(4 * MBIT * 0.05)


def test_without_caps_there_is_nothing_to_ask() -> None:
    assert (Caps().up, Caps().down, Caps().splice_bytes, Caps().details()) == (None, None, None, {})
    up_only = Caps(LimitsConfig(upload_mbit=8))
    assert up_only.down is None
    assert up_only.splice_bytes == int(8 * MBIT * 0.05)


async def test_a_relay_passes_words_on_at_once(autojump_clock: trio.testing.MockClock) -> None:
    caps = Caps(LimitsConfig(upload_mbit=0.8, download_mbit=8))
    before = trio.current_time()
    # files fill the line for seconds, and a word goes all the same
    await caps.relayed(int(CREDIT_S * 0.8 * MBIT))
    for _ in range(3):
        await caps.relayed(WORD_BYTES)
    assert trio.current_time() == before
    await caps.relayed(100_000)
    assert trio.current_time() - before == pytest.approx(1.0, abs=0.2)


@pytest.mark.loopback
@pytest.mark.parametrize("direction", ["upload", "download"])
async def test_a_transfer_stays_under_its_cap_within_five_percent(
    network: Network, tmp_path: Path, direction: str
) -> None:
    """Two files at once, so that the cap is seen to be the node's and not a transfer's."""
    mbit, seconds = 64.0, 2.0
    size = int(mbit * MBIT * seconds / 2)
    capped = LimitsConfig(upload_mbit=mbit) if direction == "upload" else LimitsConfig(download_mbit=mbit)
    free = LimitsConfig()
    sources = [tmp_path / "a", tmp_path / "b"]
    for source in sources:
        source.write_bytes(os.urandom(size))
    ended: list[float] = []

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return tmp_path / f"received-{meta.name}"

    async def arrived(caller: str, meta: TransferMeta, path: Path) -> None:
        ended.append(trio.current_time())

    async with (
        network.gateway(roles=(), limits=capped if direction == "download" else free) as far,
        network.leaf("worker", [far], limits=capped if direction == "upload" else free) as near,
    ):
        far.transfers.accept("update", None, gate, arrived)
        metas = [await meta_of(source, "update", source.name) for source in sources]
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for source, meta in zip(sources, metas, strict=True):
                nursery.start_soon(near.transfers.send, far.ref(), source, meta)
        took_s = trio.current_time() - began
    # no faster than the cap, but for the burst with which it begins; how much slower is the machine's affair
    assert took_s >= 0.95 * seconds - CREDIT_S
    assert max(ended) - min(ended) <= 0.35 * took_s, "the two had equal shares, so they end together"
    print(f"{direction}: {2 * size * 8 / 1e6 / took_s:.1f} of {mbit:g} Mbit/s")


@pytest.mark.loopback
async def test_a_gateway_caps_what_it_relays_and_requests_get_through(
    network: Network, tmp_path: Path
) -> None:
    """A file fills the circuit, and what the same two nodes ask each other goes through that circuit too."""
    mbit, seconds = 16.0, 2.5
    source = tmp_path / "source"
    source.write_bytes(os.urandom(int(mbit * MBIT * seconds)))
    took: list[float] = []

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return tmp_path / "received"

    async def arrived(caller: str, meta: TransferMeta, path: Path) -> None:
        pass

    hidden = ("127.0.0.0/8",)
    async with (
        network.gateway(limits=LimitsConfig(upload_mbit=mbit)) as gateway,
        network.leaf("worker", [gateway], exclude_cidr=hidden) as near,
        network.leaf("worker", [gateway], exclude_cidr=hidden) as far,
    ):
        await until(lambda: any("p2p-circuit" in one for one in far.ref().addresses))
        far.transfers.accept("update", None, gate, arrived)
        meta = await meta_of(source, "update", "source")
        await near.connect(far.ref())

        async def ask() -> None:
            while True:
                await trio.sleep(0.2)
                before = trio.current_time()
                await near.request(far.peer_id, Health())
                took.append(trio.current_time() - before)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await near.transfers.send(far.ref(), source, meta)
            took_s = trio.current_time() - began
            nursery.cancel_scope.cancel()
    assert took_s >= 0.95 * seconds - CREDIT_S
    # not behind the file, nor behind what of it would fill ordinary windows
    assert sorted(took)[len(took) // 2] < seconds / 2

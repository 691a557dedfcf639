"""Compressing where it pays: decided on a line of known speed, and done between real nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard
from tests.support.network import Network, until

from hypha.config.tuning import LimitsConfig, TransferTuning, TuningConfig
from hypha.errors import TransferFailed
from hypha.messages import PullFile, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net.bulk.blocks import MARGIN, MEASURE_ANEW_BYTES, SAMPLE_BYTES, BlockPacker, Known, Packing
from hypha.net.bulk.sending import SendAttempt, Sending
from hypha.net.bulk.transfers import meta_of
from hypha.net.bulk.wire import BLOCK_BYTES

MB = 1e6


@dataclass
class Line:
    """A socket whose buffer the line empties at ``rate``, and a processor that compresses ``speed`` bytes a
    second to ``ratio``.
    """

    rate: float
    speed: float = 300 * MB
    ratio: float = 0.5
    buffer_bytes: float = 256e3
    now: float = 0.0
    #: when all that was written is gone
    empty_at: float = 0.0

    def write(self, size: int) -> float:
        began = self.now
        # as much as fits is taken at once, and the rest when there is room
        self.empty_at = max(self.empty_at, self.now) + size / self.rate
        self.now = max(self.now, self.empty_at - self.buffer_bytes / self.rate)
        return self.now - began

    def send(self, packing: Packing | None, size: int) -> float:
        """Seconds that a file takes until the last byte is gone."""
        began, left = self.now, size
        while left:
            block = min(left, BLOCK_BYTES)
            wire = block
            if packing is not None and packing.wants_sample(block):
                took_s = SAMPLE_BYTES / self.speed
                self.now += took_s
                packing.sampled(SAMPLE_BYTES, int(SAMPLE_BYTES * self.ratio), took_s)
            if packing is not None and packing.pays:
                took_s = block / self.speed
                self.now += took_s
                if packing.packed(block, int(block * self.ratio), took_s):
                    wire = int(block * self.ratio)
            took_s = self.write(wire)
            if packing is not None:
                packing.sent(block, wire, took_s)
            left -= block
        self.now = max(self.now, self.empty_at)
        return self.now - began


@pytest.mark.parametrize("rate", [0.5, 2, 10, 50, 200, 2000])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.01])
@pytest.mark.parametrize("speed", [100, 500])
def test_it_takes_about_as_long_as_the_better_of_both(rate: float, ratio: float, speed: float) -> None:
    size, known = 64 << 20, Known()
    for _ in range(2):
        packing = Packing("auto", known=known)
        took_s = Line(rate * MB, speed * MB, ratio).send(packing, size)
        known = packing.known
    # of the second file, for which the line is known
    plain_s = Line(rate * MB, speed * MB, ratio).send(None, size)
    packed_s = Line(rate * MB, speed * MB, ratio).send(Packing("always"), size)
    # between a gain and MARGIN times a gain it stays as it is
    assert took_s <= 1.05 * min(plain_s, MARGIN * packed_s) + 0.005
    assert took_s <= 1.02 * plain_s + 0.005, "it never costs more than a few samples"
    if rate <= 10 and ratio <= 0.5:
        # now and then it looks how fast the line is without
        assert took_s <= 1.3 * packed_s


def test_the_first_file_gains_too() -> None:
    packing = Packing("auto")
    took_s = Line(2 * MB).send(packing, 64 << 20)
    assert took_s <= 0.6 * Line(2 * MB).send(None, 64 << 20)
    assert packing.packed_bytes == pytest.approx(0.5 * packing.plain_bytes, rel=0.01)


def test_what_does_not_shrink_is_tried_less_and_less() -> None:
    packing, line, tries = Packing("auto"), Line(2 * MB, ratio=1.0), 0
    real = packing.sampled

    def sampled(plain: int, packed: int, took_s: float) -> None:
        nonlocal tries
        tries += 1
        real(plain, packed, took_s)

    packing.sampled = sampled  # type: ignore[method-assign]
    line.send(packing, 1 << 30)
    assert 3 <= tries <= 9
    assert packing.plain_bytes == 0


def test_data_that_changes_is_followed() -> None:
    packing, line = Packing("auto"), Line(2 * MB, ratio=1.0)
    line.send(packing, 8 << 20)
    assert not packing.known.pays
    line.ratio = 0.2
    line.send(packing, 64 << 20)
    assert packing.known.pays
    line.ratio = 1.0
    line.send(packing, 2 << 20)
    assert not packing.known.pays


def test_a_line_that_has_become_fast_is_noticed() -> None:
    packing, line = Packing("auto"), Line(2 * MB, ratio=0.2)
    line.send(packing, 16 << 20)
    assert packing.known.pays
    line.rate = 2000 * MB
    line.send(packing, 2 * MEASURE_ANEW_BYTES)
    assert not packing.known.pays


def readings(size: int) -> bytes:
    """Data as slices often have it: small whole numbers in wide columns."""
    return b"".join(bytes([one % 17, 0, 0, 0]) for one in os.urandom(size // 4))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[SendAttempt]:
    """What was sent, each attempt."""
    found: list[SendAttempt] = []
    real = Sending._learn

    def learn(self: Sending, attempt: SendAttempt) -> None:
        found.append(attempt)
        real(self, attempt)

    monkeypatch.setattr(Sending, "_learn", learn)
    return found


@dataclass
class Served:
    """A slice that a data node serves."""

    path: Path
    meta: TransferMeta

    async def provide(self, caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return self.path, self.meta

    async def pulled(self, worker: Node, data: Node, destination: Path) -> None:
        data.transfers.serve("slice", self.provide)
        request = PullFile(kind="slice", name=self.meta.name)
        await worker.transfers.pull(data.ref(), request, destination, self.meta, 1 << 30)
        assert destination.read_bytes() == self.path.read_bytes()


async def slice_of(path: Path, size: int) -> Served:
    path.write_bytes(readings(size))
    return Served(path, await meta_of(path, "slice", "set/0"))


@pytest.mark.loopback
@pytest.mark.parametrize("relayed", [False, True])
async def test_a_slice_over_a_slow_line_is_compressed_and_arrives_whole(
    network: Network, tmp_path: Path, relayed: bool, sent: list[SendAttempt]
) -> None:
    served = await slice_of(tmp_path / "slice", 4 << 20)
    hidden = ("127.0.0.0/8",) if relayed else ()
    slow = LimitsConfig(upload_mbit=24)
    async with (
        network.gateway() as gateway,
        network.leaf("data", [gateway], exclude_cidr=hidden, limits=slow) as data,
        network.leaf("worker", [gateway], exclude_cidr=hidden) as worker,
    ):
        await until(lambda: not relayed or any("p2p-circuit" in one for one in data.ref().addresses))
        for number in range(2):
            await served.pulled(worker, data, tmp_path / f"{number}")
    first, second = (attempt.packing for attempt in sent)
    assert first is not None
    assert second is not None
    # the first file has measured the line, so all of the second is compressed
    assert 0 < first.plain_bytes < served.meta.size
    assert second.plain_bytes >= 0.95 * served.meta.size
    assert second.packed_bytes < 0.5 * second.plain_bytes
    assert second.known.rate == pytest.approx(3e6, rel=0.5)


@pytest.mark.loopback
async def test_what_does_not_shrink_goes_as_it_is(
    network: Network, tmp_path: Path, sent: list[SendAttempt]
) -> None:
    served = await slice_of(tmp_path / "slice", 0)
    served.path.write_bytes(os.urandom(3 << 20))
    served.meta = await meta_of(served.path, "slice", "set/0")
    slow = LimitsConfig(upload_mbit=40)
    async with network.gateway(roles=(), limits=slow) as data, network.leaf("worker", [data]) as worker:
        await served.pulled(worker, data, tmp_path / "0")
        await served.pulled(worker, data, tmp_path / "1")
    for attempt in sent:
        assert attempt.packing is not None
        assert attempt.packing.plain_bytes == 0


@pytest.mark.loopback
async def test_who_is_not_to_compress_does_not(
    network: Network, tmp_path: Path, sent: list[SendAttempt]
) -> None:
    served = await slice_of(tmp_path / "slice", 3 << 20)
    always = TuningConfig(transfers=TransferTuning(compression="always"))
    async with network.gateway(roles=(), tuning=always) as data, network.leaf("worker", [data]) as worker:
        await served.pulled(worker, data, tmp_path / "0")
        data.transfers._sending._tuning = TransferTuning(compression="none")
        await served.pulled(worker, data, tmp_path / "1")
    assert sent[0].packing is not None
    assert sent[0].packing.packed_bytes < 0.5 * served.meta.size
    assert sent[1].packing is None


@pytest.mark.loopback
async def test_a_block_that_swells_breaks_the_connection(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A few bytes that would become many are refused before memory is taken for them."""
    served = await slice_of(tmp_path / "slice", 3 << 20)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 16 << 10
    monkeypatch.setattr(BlockPacker, "_compress", lambda self, block: bomb)
    always = TuningConfig(transfers=TransferTuning(compression="always"))
    async with network.gateway(roles=(), tuning=always) as data, network.leaf("worker", [data]) as worker:
        with caplog.at_level("INFO", "hypha.net.bulk"), pytest.raises(TransferFailed):
            await served.pulled(worker, data, tmp_path / "0")
    assert "the peer sent a compressed block of 67108864 bytes" in caplog.text

"""Requests: every way to be told no, limits, traces."""

from __future__ import annotations

import struct

import msgspec
import pytest
import trio
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from tests.support.network import Network, address_of, until

from hypha.config.tuning import ConnectionTuning
from hypha.errors import PeerUnreachable, Refused, RequestTimeout
from hypha.messages import (
    MAX_RESPONSE_BYTES,
    Acknowledged,
    DatasetDescription,
    DescribeDataset,
    FileList,
    Health,
    HealthReport,
    ListFiles,
    PeerRef,
    RefusedReply,
    ReleaseLease,
    RenewLease,
    RequestEnvelope,
    ResponseEnvelope,
    TransferMeta,
)
from hypha.net import Libp2pNode as Node
from hypha.net.rpc import PROTOCOL, frame, may_act_as, read_frame

pytestmark = pytest.mark.loopback

MAX_INBOUND_PER_PEER = ConnectionTuning().requests_per_peer


def ref_of(node: Node) -> PeerRef:
    return PeerRef(peer=node.peer_id, addresses=(address_of(node),))


def test_no_role_is_any_role() -> None:
    assert may_act_as(frozenset(), frozenset({"scheduler"}))
    assert may_act_as(frozenset({"scheduler", "data"}), frozenset({"scheduler"}))
    assert not may_act_as(frozenset({"worker"}), frozenset({"scheduler"}))


async def code_of(caller: Node, callee: Node, request: object) -> str:
    with pytest.raises(Refused) as refused:
        await caller.request(ref_of(callee), request)  # type: ignore[arg-type]
    assert refused.value.peer in (callee.peer_id, "")
    return refused.value.code


async def test_refusals_carry_their_codes(network: Network, caplog: pytest.LogCaptureFixture) -> None:
    async def refuses(caller: str, request: RenewLease) -> Acknowledged:
        raise Refused("lease", "no such lease")

    async def fails(caller: str, request: ReleaseLease) -> Acknowledged:
        raise RuntimeError("a bug")

    async def floods(caller: str, request: ListFiles) -> FileList:
        meta = TransferMeta(kind="model", name="n" * MAX_RESPONSE_BYTES, size=1, blake3="")
        return FileList(files=(meta,))

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.answer(RenewLease, refuses)
        two.answer(ReleaseLease, fails)
        two.answer(ListFiles, floods)
        assert await code_of(one, two, RenewLease(lease_id="1")) == "lease"
        assert await code_of(one, two, ReleaseLease(lease_id="1")) == "internal"
        assert "a bug" in caplog.text
        assert await code_of(one, two, ListFiles(kind="model")) == "too-large"
        assert await code_of(one, two, DescribeDataset(dataset="d")) == "unsupported"
        assert await code_of(one, two, DescribeDataset(dataset="d" * (2 << 20))) == "too-large"
        assert isinstance(await one.request(two.peer_id, Health()), HealthReport)


async def say(caller: Node, callee: Node, data: bytes) -> ResponseEnvelope:
    stream = await caller.open_stream(ref_of(callee), PROTOCOL)
    await stream.write(data)
    answer = await read_frame(stream, MAX_RESPONSE_BYTES)
    await stream.close()
    return msgspec.msgpack.decode(answer, type=ResponseEnvelope)


async def test_what_does_not_decode_is_malformed(network: Network) -> None:
    strange = msgspec.msgpack.encode({"body": {"type": "no-such-thing"}, "v": 1})
    newer = msgspec.msgpack.encode(RequestEnvelope(body=Health(), v=99))
    async with network.leaf("a") as one, network.leaf("b") as two:
        for data in (frame(b"\xff\x00junk"), frame(b""), frame(strange), frame(newer)):
            reply = (await say(one, two, data)).body
            assert isinstance(reply, RefusedReply)
            assert reply.code == "malformed"
        reply = (await say(one, two, struct.pack(">I", 1 << 31))).body
        assert isinstance(reply, RefusedReply)
        assert reply.code == "too-large"


async def test_over_the_limit_the_answer_is_busy_and_nobody_is_reset(network: Network) -> None:
    started, release = 0, trio.Event()
    codes: list[str] = []

    async def slow(caller: str, request: RenewLease) -> Acknowledged:
        nonlocal started
        started += 1
        await release.wait()
        return Acknowledged()

    async with network.leaf("a") as one, network.leaf("b") as two, network.leaf("c") as third:
        two.answer(RenewLease, slow)

        async def ask() -> None:
            try:
                await one.request(ref_of(two), RenewLease(lease_id="1"), timeout_s=20)
                codes.append("ok")
            except Refused as exc:
                codes.append(exc.code)

        async with trio.open_nursery() as nursery:
            for _ in range(MAX_INBOUND_PER_PEER + 24):
                nursery.start_soon(ask)
            await until(lambda: len(codes) == 24)
            assert set(codes) == {"busy"}
            assert started == MAX_INBOUND_PER_PEER
            # somebody else is not shut out by one greedy peer
            assert isinstance(await third.request(ref_of(two), Health()), HealthReport)
            release.set()
        assert codes.count("ok") == MAX_INBOUND_PER_PEER


async def test_time_outs_and_strangers(network: Network) -> None:
    async def never(caller: str, request: RenewLease) -> Acknowledged:
        await trio.sleep_forever()
        raise AssertionError

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.answer(RenewLease, never)
        with pytest.raises(RequestTimeout, match="RenewLease within"):
            await one.request(ref_of(two), RenewLease(lease_id="1"), timeout_s=0.2)
        with pytest.raises(PeerUnreachable):
            await one.request(PeerRef(peer="not a PeerID"), Health())
        with pytest.raises(PeerUnreachable):
            await one.request(one.peer_id, Health())
        with pytest.raises(PeerUnreachable, match="no address of it is known"):
            await one.request(network.pki.identity("x").peer_id, Health())


async def test_the_trace_goes_on_at_the_other_side(network: Network) -> None:
    seen: list[int] = []

    async def look(caller: str, request: DescribeDataset) -> DatasetDescription:
        seen.append(trace.get_current_span().get_span_context().trace_id)
        raise Refused("not-found", "none")

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.answer(DescribeDataset, look)
        span = NonRecordingSpan(SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(1)))
        with trace.use_span(span):
            assert await code_of(one, two, DescribeDataset(dataset="d")) == "not-found"
        assert await code_of(one, two, DescribeDataset(dataset="d")) == "not-found"
        assert seen == [0xABC, 0]


async def test_a_caller_that_gave_up_is_served_no_longer(network: Network) -> None:
    """Its place among the requests being served is free at once, and work for nobody is not gone on with."""
    ended = []

    async def never(caller: str, request: RenewLease) -> Acknowledged:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(request.lease_id)
        raise AssertionError

    async with network.leaf("a") as one, network.leaf("b") as two:
        two.answer(RenewLease, never)
        # more than may be served at once for one caller
        for number in range(40):
            with pytest.raises(RequestTimeout):
                await one.request(ref_of(two), RenewLease(lease_id=str(number)), timeout_s=0.05)
            await until(lambda: two._rpc._inbound.total() == 0)
        assert isinstance(await one.request(two.peer_id, Health()), HealthReport)
    assert ended

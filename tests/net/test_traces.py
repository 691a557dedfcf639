"""Spans of what leaves and enters a node: their parents, across nodes, and their attributes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from tests.support.network import Network, address_of, until
from tests.support.signals import Signals

from hypha.errors import PeerUnreachable, Refused
from hypha.messages import (
    WORKER_TOPIC,
    Acknowledged,
    ExecutorDescriptor,
    GossipEnvelope,
    Health,
    JobStamp,
    ListFiles,
    PeerRef,
    Progress,
    PullFile,
    Report,
    RequestEnvelope,
    Resources,
    TransferMeta,
    WorkerRequest,
    encode,
)
from hypha.net import Libp2pNode as Node
from hypha.net import meta_of
from hypha.net.peers.table import PeerTable
from hypha.net.rpc import PROTOCOL, frame, read_frame
from hypha.tracing import span, traceparent
from hypha.tracing.operations import ADVERTISE, FETCH_SLICE, SEND_UPDATE

pytestmark = pytest.mark.loopback

NO_LOOPBACK = ("127.0.0.0/8",)


def worker_request(scheduler: Node, request_id: str = "r1") -> WorkerRequest:
    return WorkerRequest(
        request_id=request_id,
        scheduler=scheduler.ref(),
        resources=Resources(cpu=1),
        executor=ExecutorDescriptor(kind="train", name="diloco-transformer"),
        count=1,
        bid=1.0,
        offer_within_s=0.5,
    )


async def refuse(caller: str, request: ListFiles) -> Acknowledged:
    raise Refused("not-found", "there are none")


async def test_an_answer_is_part_of_its_request(network: Network, signals: Signals) -> None:
    async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:
        gateway.answer(ListFiles, refuse)
        with span(ADVERTISE):
            await worker.request(gateway.peer_id, Health())
            with pytest.raises(Refused):
                await worker.request(gateway.peer_id, ListFiles(kind="model"))
        await until(lambda: len(signals.spans("Answer")) == 2)
        good, bad = signals.spans("Answer")
        assert signals.path_to(good) == [ADVERTISE.name, "Request", "Answer"]
        asked = signals.parent_of(good)
        assert asked is not None
        for one, peer in ((asked, gateway), (good, worker)):
            assert one.attributes == {
                "rpc.system": "hypha",
                "rpc.method": "Health",
                "hypha.peer": peer.peer_id,
            }
        asked_in_vain = signals.parent_of(bad)
        assert asked_in_vain is not None
        assert {one.attributes["error.type"] for one in (bad, asked_in_vain)} == {"not-found"}
        assert not asked_in_vain.status.is_ok
        (opened, _) = signals.spans("Open stream", hypha_protocol="/hypha/rpc/1")
        assert signals.path_to(opened) == [ADVERTISE.name, "Request", "Open stream"]


async def test_what_a_node_does_by_itself_is_part_of_nothing(network: Network, signals: Signals) -> None:
    with span(ADVERTISE) as outer:
        async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:
            # the library's tasks that serve this connection were started inside a request
            await worker.disconnect(gateway.peer_id)
            await worker.request(gateway.peer_id, Health())
            await until(lambda: worker.gateway == gateway.peer_id)
            await gateway.request(worker.peer_id, Health())
    answers = signals.spans("Answer")
    assert [signals.path_to(one) for one in answers] == 2 * [[ADVERTISE.name, "Request", "Answer"]]
    assert outer.get_span_context().trace_id == answers[0].context.trace_id
    roots = {one.name for one in signals.spans() if one.parent is None}
    assert roots == {ADVERTISE.name, "Connect", "Open stream"}


async def test_a_connection_is_no_part_of_the_operation_that_made_it(
    network: Network, signals: Signals
) -> None:
    async with network.leaf("a") as one, network.leaf("b") as other:
        with span(ADVERTISE):
            await one.connect(PeerRef(peer=other.peer_id, addresses=(address_of(other),)))
        # from a node that traces nothing
        stream = await other.open_stream(one.peer_id, PROTOCOL)
        await stream.write(frame(encode(RequestEnvelope(body=Health()))))
        await read_frame(stream, 10_000)
        await stream.close()
        await until(lambda: signals.spans("Answer"))
        (answer,) = signals.spans("Answer")
        assert answer.parent is None


@pytest.mark.parametrize("larger", [False, True], ids=["smaller PeerID dials", "larger PeerID dials"])
async def test_connecting_tells_what_was_tried(
    network: Network, signals: Signals, monkeypatch: pytest.MonkeyPatch, larger: bool
) -> None:
    """Also where the dial that has connected is cancelled before it returns."""
    connected = PeerTable.connected

    async def told_slowly(peers: PeerTable, swarm: object, connection: object) -> None:
        await connected(peers, swarm, connection)
        await trio.sleep(0.05)

    monkeypatch.setattr(PeerTable, "connected", told_slowly)
    with trio.socket.socket() as closed:
        await closed.bind(("127.0.0.1", 0))
        nobody = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"
    async with network.leaf("a") as a, network.leaf("b") as b:
        one, other = sorted((a, b), key=lambda node: node.peer_id, reverse=larger)
        there = (f"{nobody}/p2p/{other.peer_id}", address_of(other))
        with span(ADVERTISE):
            await one.connect(PeerRef(peer=other.peer_id, addresses=there))
        (connecting,) = signals.spans("Connect")
        assert signals.path_to(connecting) == [ADVERTISE.name, "Connect"]
        place = address_of(other).removesuffix(f"/p2p/{other.peer_id}")
        noted = {(event.name, event.attributes["network.peer.address"]) for event in connecting.events}
        assert noted >= {("dialling", nobody), ("failed", nobody), ("dialling", place), ("connected", place)}
        (failed,) = [event for event in connecting.events if event.name == "failed"]
        assert "Connection refused" in failed.attributes["hypha.reason"]

        gone = network.pki.identity("gone").peer_id
        with pytest.raises(PeerUnreachable):
            await one.connect(PeerRef(peer=gone, addresses=(f"{nobody}/p2p/{gone}",)))
        (failed,) = signals.spans("Connect", hypha_peer=gone)
        assert failed.attributes["error.type"] == "unreachable"
        assert not failed.status.is_ok


async def test_an_advertisement_is_one_trace_through_the_gateway(network: Network, signals: Signals) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        with span(ADVERTISE):
            await scheduler.publish(worker_request(scheduler))
        with trio.fail_after(20):
            item = await heard.receive()
        await until(lambda: signals.spans("Relay message"))
        (received,) = signals.spans("Receive advertisement")
        assert signals.path_to(received) == [
            "Publish task advertisement",
            "Gossipsub publish",
            "Relay message",
            "Receive advertisement",
        ]
        (relayed,) = signals.spans("Relay message")
        assert relayed.attributes == {
            "messaging.operation.name": "send",
            "messaging.destination.name": WORKER_TOPIC,
            "hypha.peer": scheduler.peer_id,
            "hypha.receivers": 1,
        }
        # the worker goes on from there
        assert item.traceparent is not None
        assert item.traceparent.split("-")[2] == f"{received.context.span_id:016x}"


async def test_a_message_that_two_gateways_passed_on_tells_so(network: Network, signals: Signals) -> None:
    async with (
        network.gateway() as one,
        network.gateway([one]) as two,
        network.leaf("worker", [one]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [two]) as scheduler,
    ):
        await until(lambda: one.mesh_size == two.mesh_size == 2)
        with span(ADVERTISE):
            await scheduler.publish(worker_request(scheduler))
        with trio.fail_after(20):
            await heard.receive()
        await until(lambda: len(signals.spans("Relay message")) == 2)
        (received,) = signals.spans("Receive advertisement")
        names = [ADVERTISE.name, "Gossipsub publish", "Relay message", "Relay message"]
        assert signals.path_to(received) == [*names, "Receive advertisement"]


@pytest.mark.parametrize("sent", [None, "", "nonsense", "a-b-c-d", f"00-{32 * '0'}-{16 * '0'}-01"])
async def test_a_message_that_names_no_operation_is_heard(
    network: Network, signals: Signals, sent: str | None
) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await until(lambda: gateway.mesh_size == 2)
        envelope = GossipEnvelope(
            body=worker_request(scheduler),
            traceparent=sent,
            certificates=scheduler.identity.certificates,
        )
        await scheduler._gossip._pubsub.publish(WORKER_TOPIC, encode(envelope))
        with trio.fail_after(20):
            assert (await heard.receive()).publisher == scheduler.peer_id
        await until(lambda: signals.spans("Relay message"))
        for name in ("Relay message", "Receive advertisement"):
            (found,) = signals.spans(name)
            assert found.parent is None
            assert found.context.is_valid


async def test_dht_queries_are_answered_in_their_traces(network: Network, signals: Signals) -> None:
    async with (
        network.gateway() as gateway,
        network.leaf("data", [gateway]) as data,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        with span(ADVERTISE) as outer:
            assert await data.provide("digits") == 1
            (ref,) = await scheduler.find_providers("digits")
        assert ref.peer == data.peer_id
        # a data node announces once more when its gateway has reserved a place for its circuits
        trace_id = f"{outer.get_span_context().trace_id:032x}"

        def answers() -> list[list[str]]:
            found = [one for one in signals.spans("DHT answer") if f"{one.context.trace_id:032x}" == trace_id]
            return [[*signals.path_to(one), one.attributes["rpc.method"]] for one in found]

        await until(lambda: len(answers()) == 3)
        # who announces asks which other gateways there are
        assert answers() == [
            [ADVERTISE.name, "DHT provide", "DHT answer", "provide"],
            [ADVERTISE.name, "DHT provide", "DHT answer", "find"],
            [ADVERTISE.name, "DHT lookup", "DHT answer", "find"],
        ]
        (lookup,) = signals.spans("DHT lookup")
        assert lookup.attributes == {"hypha.dataset": "digits", "hypha.answers": 1}


def accept(node: Node, directory: Path, *kinds: str) -> None:
    async def gate(caller: str, meta: TransferMeta) -> Path:
        if meta.name == "unwanted":
            raise Refused("uninvited", "no")
        return directory / f"arrived-{meta.name}"

    async def arrived(caller: str, meta: TransferMeta, path: Path) -> None: ...

    for kind in kinds:
        node.transfers.accept(kind, None, gate, arrived)


async def test_a_file_is_received_in_the_trace_of_who_sends_it(
    network: Network, signals: Signals, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(50_000))
    stamp = JobStamp(job_id="job-1", generation=2, round=3)
    async with network.gateway(roles=()) as far, network.leaf("worker", [far]) as near:
        accept(far, tmp_path, "update")
        for name in ("first", "second"):
            with span(SEND_UPDATE):
                await near.transfers.send(
                    far.peer_id, source, await meta_of(source, "update", name, stamp=stamp)
                )
        with pytest.raises(Refused):
            await near.transfers.send(far.peer_id, source, await meta_of(source, "update", "unwanted"))
        await until(lambda: len(signals.spans("Receive file")) == 2)
        for received, kept in zip(signals.spans("Receive file"), (False, True), strict=True):
            assert signals.path_to(received) == ["Send update", "Send file", "Receive file"]
            sent = signals.parent_of(received)
            assert sent is not None
            for one, peer in ((received, near), (sent, far)):
                assert one.attributes == {
                    "hypha.peer": peer.peer_id,
                    "hypha.transfer.kind": "update",
                    "hypha.transfer.bytes": 50_000,
                    "hypha.transfer.way": "direct",
                    "hypha.transfer.kept": kept,
                    "hypha.transfer.relayed": False,
                    "hypha.job": "job-1",
                    "hypha.job.generation": 2,
                    "hypha.round": 3,
                }
        refused = signals.spans("Send file")[-1]
        assert refused.attributes["error.type"] == "uninvited"


async def test_a_file_that_was_asked_for_is_sent_in_the_askers_trace(
    network: Network, signals: Signals, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(50_000))

    async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return source, await meta_of(source, "slice", request.name)

    async with network.gateway(roles=()) as data, network.leaf("worker", [data]) as worker:
        data.transfers.serve("slice", provide)
        with span(FETCH_SLICE):
            request = PullFile(kind="slice", name="digits/0")
            await worker.transfers.pull(data.peer_id, request, tmp_path / "slice", None, 1 << 20)
        await until(lambda: signals.spans("Receive file") and signals.spans("Send file"))
        (received,) = signals.spans("Receive file")
        assert signals.path_to(received) == ["Fetch slice", "Send file", "Receive file"]


async def test_a_relayed_file_and_its_circuit(network: Network, signals: Signals, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(50_000))
    async with (
        network.gateway() as gateway,
        network.leaf("a", [gateway], exclude_cidr=NO_LOOPBACK) as sender,
        network.leaf("b", [gateway], exclude_cidr=NO_LOOPBACK) as receiver,
    ):
        await until(lambda: any("p2p-circuit" in one for one in receiver.ref().addresses))
        accept(receiver, tmp_path, "update")
        with span(SEND_UPDATE):
            await sender.transfers.send(receiver.ref(), source, await meta_of(source, "update", "first"))
        await until(lambda: signals.spans("Receive file"))
        (received,) = signals.spans("Receive file")
        assert signals.path_to(received) == ["Send update", "Send file", "Receive file"]
        assert received.attributes["hypha.transfer.way"] == "stream"
        assert received.attributes["hypha.transfer.relayed"] is True
        (connecting,) = signals.spans("Connect", hypha_peer=receiver.peer_id)
        assert [event.name for event in connecting.events] == ["dialling", "connected"]

        # while it lasts the circuit's span is open
        assert not signals.spans("Relay circuit")
        await sender.disconnect(receiver.peer_id)
        await until(lambda: signals.spans("Relay circuit"))
        (circuit,) = signals.spans("Relay circuit")
        assert circuit.parent is None
        assert circuit.attributes == {
            "hypha.peer": sender.peer_id,
            "hypha.relay.target": receiver.peer_id,
        }
        (link,) = circuit.links
        assert link.context.span_id == connecting.context.span_id
        opened = signals.spans("Open stream", hypha_protocol="/libp2p/circuit/relay/0.2.0/hop")
        assert connecting in map(signals.parent_of, opened)


async def test_reports_are_traced_when_their_stream_is_opened(network: Network, signals: Signals) -> None:
    arrived: list[tuple[int, str | None]] = []

    def take(caller: str, reports: list[Report]) -> None:
        arrived.extend((one.progress.batches, traceparent()) for one in reports)

    def report(batches: int) -> Report:
        progress = Progress(round=0, batches=batches, samples=0, busy_s=0.0, loss=0.0)
        return Report(stamp=JobStamp(job_id="job", round=0), incarnation="i", progress=progress)

    async with network.leaf("worker") as worker, network.leaf("scheduler") as scheduler:
        scheduler.answer_reports(take)
        worker.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
        with span(SEND_UPDATE):
            for number in (1, 2):
                worker.report(scheduler.peer_id, report(number))
                await until(lambda number=number: len(arrived) == number)
        sent, received = signals.spans("Report stream")
        assert signals.path_to(received) == ["Report stream", "Report stream"]
        assert sent.parent is None
        assert [number for number, _ in arrived] == [1, 2]
        assert arrived[0][1] is not None
        assert arrived[1][1] is None
        (opened,) = signals.spans("Open stream", hypha_protocol="/hypha/report/1")
        assert signals.parent_of(opened) is sent

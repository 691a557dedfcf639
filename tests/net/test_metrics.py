"""What metrics tell of nodes: connections, bytes, requests, gossip, look-ups, files, reports and circuits."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from tests.net.test_traces import NO_LOOPBACK, accept, refuse, worker_request
from tests.support.network import Network, address_of, until
from tests.support.proxy import proxy_to
from tests.support.signals import Signals

from hypha.errors import PeerUnreachable, Refused, RequestTimeout
from hypha.messages import Health, JobStamp, ListFiles, NextSlice, NoSlice, PeerRef, Progress, Report
from hypha.net import meta_of
from hypha.pki.authority import revoke
from hypha.pki.identity import IdentityFiles, load_identity
from hypha.telemetry import instruments

pytestmark = pytest.mark.loopback

DAY_S = 86_400


async def test_connections_are_counted_while_they_last_and_when_they_end(
    network: Network, signals: Signals
) -> None:
    lost = instruments.CONNECTIONS_LOST
    async with network.gateway() as gateway, network.leaf("worker") as worker:
        await worker.connect(PeerRef(peer=gateway.peer_id, addresses=(address_of(gateway),)))
        await until(lambda: gateway.is_connected(worker.peer_id))
        for direction in ("inbound", "outbound"):
            made = instruments.CONNECTIONS_ESTABLISHED
            assert signals.reading(made, direction=direction, way="direct") == 1
            assert signals.reading(made, direction=direction, way="relayed") == 0
        # a process has one node; of two the last shows its own
        assert sorted(signals.readings(instruments.CONNECTIONS).values()) == [0, 0, 0, 1]
        for instrument in (instruments.BYTES_SENT, instruments.BYTES_RECEIVED):
            await until(lambda instrument=instrument: signals.reading(instrument, plane="control") > 1000)
            assert signals.reading(instrument, plane="bulk") == 0
        await until(lambda: all(one.round_trip_s for one in worker.connections()))
        (connection,) = worker.connections()
        shown = signals.reading(instruments.ROUND_TRIP, peer=gateway.peer_id)
        assert shown == connection.round_trip_s
        assert 0 < shown < 1
        assert 0 < signals.reading(instruments.UPTIME) < 60

        await worker.disconnect(gateway.peer_id)
        await until(lambda: signals.reading(lost, reason="closed") == 2)
        assert sorted(signals.readings(instruments.CONNECTIONS).values()) == [0, 0, 0, 0]
        assert signals.readings(instruments.ROUND_TRIP) == {}
    # a node that has ended is not shown
    assert signals.readings(instruments.CONNECTIONS) == {}


async def test_the_bytes_counted_are_those_on_the_line(network: Network, signals: Signals) -> None:
    async with network.leaf("b") as other:
        async with proxy_to("127.0.0.1", int(other.listen_addresses()[0].rpartition("/")[2])) as proxy:
            async with network.leaf("a") as one:
                place = f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{other.peer_id}"
                await one.request(PeerRef(peer=other.peer_id, addresses=(place,)), Health())
            await until(lambda: not other.connections())
            passed = proxy.passed_bytes
    assert passed > 1000
    # goodbyes may meet a closed socket
    for instrument in (instruments.BYTES_SENT, instruments.BYTES_RECEIVED):
        assert signals.reading(instrument, plane="control") == pytest.approx(passed, abs=100)


async def test_a_connection_that_fell_silent_is_lost_for_that_reason(
    network: Network, signals: Signals
) -> None:
    network.timings = network.timings.model_copy(update={"silence_s": 1.0})
    async with network.leaf("a") as one, network.leaf("b") as other:
        async with proxy_to("127.0.0.1", int(other.listen_addresses()[0].rpartition("/")[2])) as proxy:
            place = f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{other.peer_id}"
            await one.connect(PeerRef(peer=other.peer_id, addresses=(place,)))
            proxy.freeze()
            await until(lambda: signals.reading(instruments.CONNECTIONS_LOST, reason="silent") >= 1)


async def test_connections_that_come_to_nothing_are_counted_with_their_reason(
    network: Network, signals: Signals, tmp_path: Path
) -> None:
    failed = instruments.CONNECTIONS_FAILED
    async with network.leaf("a") as one:
        gone = network.pki.identity("gone").peer_id
        with pytest.raises(PeerUnreachable):
            await one.connect(PeerRef(peer=gone, addresses=(f"/ip4/127.0.0.1/tcp/1/p2p/{gone}",)))
        assert signals.readings(failed) == {
            frozenset({("direction", "outbound"), ("reason", "unreachable")}): 1
        }
    revoked = network.pki.files("revoked")
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [revoked.cert], crl)
    good = network.pki.files("good")
    aware = load_identity(IdentityFiles(good.cert, good.key, good.trust, crl))
    async with (
        network.leaf("worker", identity=aware) as ours,
        network.leaf("worker", identity=load_identity(revoked)) as theirs,
    ):
        with pytest.raises(PeerUnreachable):
            await ours.connect(PeerRef(peer=theirs.peer_id, addresses=(address_of(theirs),)))
        assert signals.reading(failed, direction="outbound", reason="certificate") == 1
        theirs.learn(PeerRef(peer=ours.peer_id, addresses=(address_of(ours),)))
        with pytest.raises((PeerUnreachable, RequestTimeout)):
            await theirs.request(ours.peer_id, Health())
        await until(lambda: signals.reading(failed, direction="inbound", reason="certificate") >= 1)


async def test_a_certificate_that_is_revoked_meanwhile_is_the_reason_of_a_loss(
    network: Network, signals: Signals, tmp_path: Path
) -> None:
    bystander, theirs, mine = (network.pki.files(name) for name in ("bystander", "theirs", "mine"))
    crl = tmp_path / "crls.pem"
    revoke(network.pki.org, [bystander.cert], crl)
    aware = load_identity(IdentityFiles(mine.cert, mine.key, mine.trust, crl))
    async with (
        network.leaf("a", identity=aware) as ours,
        network.leaf("b", identity=load_identity(theirs)) as other,
    ):
        await ours.connect(PeerRef(peer=other.peer_id, addresses=(address_of(other),)))
        assert signals.reading(instruments.CERTIFICATE_EXPIRES, file="crl") > 0
        revoke(network.pki.org, [theirs.cert], crl)
        await ours._peers.reload_identity()
        await until(lambda: signals.reading(instruments.CONNECTIONS_LOST, reason="revoked") == 1)


async def test_certificates_tell_when_they_expire(network: Network, signals: Signals) -> None:
    identity = load_identity(network.pki.files("node", days=30))
    async with network.leaf("worker", identity=identity):
        left = {
            dict(labels)["file"]: value / DAY_S
            for labels, value in signals.readings(instruments.CERTIFICATE_EXPIRES).items()
        }
    assert left.keys() == {"certificate", "issuer"}
    assert 29 < left["certificate"] <= 30
    assert left["issuer"] > left["certificate"]


async def test_requests_are_timed_at_both_ends_by_how_they_end(network: Network, signals: Signals) -> None:
    asked, answered = instruments.REQUEST_DURATION, instruments.ANSWER_DURATION

    async def slow(caller: str, request: NextSlice) -> NoSlice:
        await trio.sleep_forever()
        raise AssertionError

    async with network.gateway() as gateway, network.leaf("worker", [gateway]) as worker:
        gateway.answer(ListFiles, refuse)
        gateway.answer(NextSlice, slow)
        await worker.request(gateway.peer_id, Health())
        with pytest.raises(Refused):
            await worker.request(gateway.peer_id, ListFiles(kind="model"))
        question = NextSlice(stamp=JobStamp(job_id="job", round=0), incarnation="i", seq=1)
        with pytest.raises(RequestTimeout):
            await worker.request(gateway.peer_id, question, timeout_s=0.3)
        with trio.move_on_after(0.1):
            await worker.request(gateway.peer_id, question)
        await worker.disconnect(gateway.peer_id)
    for name, status in (("Health", "success"), ("ListFiles", "not-found")):
        assert signals.reading(asked, type=name, status=status) == 1
        assert signals.reading(answered, type=name, status=status) == 1
    for status in ("timeout", "cancelled"):
        assert signals.reading(asked, type="NextSlice", status=status) == 1
    assert len(signals.readings(answered)) == 2


async def test_gossip_and_lookups_are_counted(network: Network, signals: Signals) -> None:
    async with (
        network.gateway() as gateway,
        network.gateway([gateway]) as other,
        network.leaf("worker", [gateway]) as worker,
        worker.subscribe() as heard,
        network.leaf("scheduler", [gateway]) as scheduler,
    ):
        await until(lambda: gateway.mesh_size == 3)
        meshes = sum(one.mesh_size for one in (gateway, other, worker, scheduler))
        assert sum(signals.readings(instruments.GOSSIP_MESH).values()) <= meshes
        await scheduler.publish(worker_request(scheduler))
        with trio.fail_after(20):
            await heard.receive()
        messages = instruments.GOSSIP_MESSAGES
        await until(lambda: signals.reading(messages, event="received") == 3)  # both gateways, the worker
        assert signals.reading(messages, event="published") == 1
        assert signals.reading(messages, event="relayed") == 1
        assert signals.reading(messages, event="dropped") == 0

        await until(lambda: signals.reading(instruments.DHT_ROUTING_TABLE) == 1)
        await scheduler.find_providers("digits")
        queries = instruments.DHT_QUERIES
        assert signals.reading(queries, side="client", operation="find", status="success") == 1
        # the gateway that is connected, and the one that it named
        await until(lambda: signals.reading(queries, side="server", operation="find", status="success") == 2)
        assert signals.reading(instruments.DHT_QUERY_DURATION, operation="find") == 1
    async with network.leaf("scheduler") as alone:
        await alone.find_providers("digits")
        assert signals.reading(queries, side="client", operation="find", status="failure") == 1


async def test_files_are_counted_at_both_ends_and_their_bytes_by_plane(
    network: Network, signals: Signals, tmp_path: Path
) -> None:
    size = 1 << 20
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    seen: set[tuple[str, float]] = set()
    async with network.gateway(roles=()) as far, network.leaf("worker", [far]) as near:
        accept(far, tmp_path, "theta")
        meta = await meta_of(source, "theta", "theta")

        async def look() -> None:
            while True:
                seen.update(
                    (dict(labels)["direction"], value)
                    for labels, value in signals.readings(instruments.TRANSFERS).items()
                )
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            await near.transfers.send(far.peer_id, source, meta)
            nursery.cancel_scope.cancel()
        with pytest.raises(Refused):
            await near.transfers.send(far.peer_id, source, await meta_of(source, "theta", "unwanted"))
        duration = instruments.TRANSFER_DURATION
        for direction in ("inbound", "outbound"):
            await until(
                lambda direction=direction: signals.reading(
                    duration, kind="theta", direction=direction, status="success"
                )
            )
            assert signals.reading(instruments.TRANSFER_BYTES, kind="theta", direction=direction) == size
        assert signals.reading(duration, kind="theta", direction="outbound", status="failure") == 1
        for instrument in (instruments.BYTES_SENT, instruments.BYTES_RECEIVED):
            assert size < signals.reading(instrument, plane="bulk") < size + 10_000
            assert signals.reading(instrument, plane="control") < size
        assert ("outbound", 1) in seen
        assert set(signals.readings(instruments.TRANSFERS).values()) == {0}


async def test_what_a_gateway_relays_is_counted_once(
    network: Network, signals: Signals, tmp_path: Path
) -> None:
    size = 1 << 20
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))
    async with (
        network.gateway() as gateway,
        network.leaf("a", [gateway], exclude_cidr=NO_LOOPBACK) as sender,
        network.leaf("b", [gateway], exclude_cidr=NO_LOOPBACK) as receiver,
    ):
        await until(lambda: signals.reading(instruments.RESERVATIONS) == 2)
        await until(lambda: any("p2p-circuit" in one for one in receiver.ref().addresses))
        accept(receiver, tmp_path, "update")
        await sender.transfers.send(receiver.ref(), source, await meta_of(source, "update", "first"))
        assert signals.reading(instruments.CIRCUITS) == 1
        assert signals.reading(instruments.CIRCUITS_OPENED, status="accepted") == 1
        assert size < signals.reading(instruments.RELAY_BYTES) < size + 50_000
        # it goes over two lines, and is sent twice
        sent = instruments.BYTES_SENT
        await until(lambda: signals.reading(sent, plane="control") > 2 * size)
        assert signals.reading(sent, plane="control") < 2 * size + 100_000
        assert signals.reading(instruments.BYTES_SENT, plane="bulk") == 0
        gone = network.pki.identity("gone").peer_id
        with pytest.raises(PeerUnreachable):
            await sender.connect(gone)
        assert signals.reading(instruments.CIRCUITS_OPENED, status="unreachable") == 1
        await sender.disconnect(receiver.peer_id)
        await until(lambda: signals.reading(instruments.CIRCUITS) == 0)


async def test_reports_are_counted(network: Network, signals: Signals) -> None:
    def report(batches: int) -> Report:
        progress = Progress(round=0, batches=batches, samples=0, busy_s=0.0, loss=0.0)
        return Report(stamp=JobStamp(job_id="job", round=0), incarnation="i", progress=progress)

    async with network.leaf("worker") as worker, network.leaf("scheduler") as scheduler:
        worker.learn(PeerRef(peer=scheduler.peer_id, addresses=(address_of(scheduler),)))
        scheduler.answer_reports(lambda caller, reports: None)
        for number in range(3):
            worker.report(scheduler.peer_id, report(number))
        reports = instruments.REPORTS
        await until(lambda: signals.reading(reports, event="received") == 1)
        assert signals.reading(reports, event="sent") == 1
        assert signals.reading(reports, event="replaced") == 2


async def test_debug_tells_of_connections_requests_and_files(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1000))
    with caplog.at_level(logging.DEBUG, "hypha.net"):
        async with network.gateway(roles=()) as far, network.leaf("worker", [far]) as near:
            accept(far, tmp_path, "update")
            await near.transfers.send(far.peer_id, source, await meta_of(source, "update", "first"))
            await near.request(far.peer_id, Health())
            await near.provide("digits")
            await near.publish(worker_request(near))
    said = {(record.name, record.getMessage().split()[0]) for record in caplog.records}
    assert said >= {
        ("hypha.net.peers.table", "Connected"),
        ("hypha.net.peers.table", "The"),
        ("hypha.net.rpc", "Request"),
        ("hypha.net.rpc", "Answered"),
        ("hypha.net.bulk.signals", "first"),
        ("hypha.net.discovery.dht", "DHT"),
        ("hypha.net.discovery.gossip", "Published"),
    }


def test_while_telemetry_is_off_nothing_of_the_sdk_is_loaded(tmp_path: Path) -> None:
    """Whole nodes, with a request, a report and a file, in a process of their own."""
    program = tmp_path / "off.py"
    program.write_text(
        f"""
import sys
from pathlib import Path
import trio
from tests.support.network import Network
from hypha.messages import Health
from hypha.net import meta_of

async def main():
    directory = Path({str(tmp_path)!r})
    network = Network(directory / "pki")
    async def gate(caller, meta):
        return directory / "there"
    async def arrived(caller, meta, path):
        print("arrived")
    source = directory / "source"
    source.write_bytes(b"x" * 1000)
    async with network.gateway(roles=()) as gateway, network.leaf("worker", [gateway]) as worker:
        gateway.transfers.accept("update", None, gate, arrived)
        await worker.request(gateway.peer_id, Health())
        await worker.transfers.send(gateway.peer_id, source, await meta_of(source, "update", "x"))
        await worker.provide("digits")

trio.run(main)
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    )
    ran = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (ran.returncode, ran.stdout.split("\n")[:2]) == (0, ["arrived", "[]"]), ran.stderr

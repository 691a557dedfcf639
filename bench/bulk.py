"""The bulk plane against plain blocking TLS sockets, file to file, between two processes.

The reference sends the file over one TLS 1.3 connection with the same certificates, and the receiver
writes it; no hash, no agreement beforehand. Repeats are interleaved, medians compared.
The relayed rate, through a gateway's circuit, is reported. What was built for a number stands beside it: kept
connections, sealed blocks and the second hash are each measured with and without.
"""

from __future__ import annotations

import os
import socket
import ssl
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio
from tests.support.proxy import proxy_to

from bench.nodes import NodeFiles, Pki, child, gateway, options
from bench.report import Bound, Report, Row
from hypha.config.tuning import LimitsConfig
from hypha.messages import PeerRef, PullFile, TransferMeta
from hypha.net import Libp2pNode as Node
from hypha.net import open_node
from hypha.net.bulk.blocks import TAG_BYTES, Opener, Sealer, new_key
from hypha.net.bulk.files import StreamHash, quick_hasher, strong_hasher
from hypha.net.bulk.transfers import meta_of
from hypha.net.bulk.wire import LENGTH_BYTES
from hypha.net.peers.addresses import host_and_port
from hypha.pki.identity import load_identity

KIND = "slice"
SENDER, RECEIVER = "data", "worker"
SIZE_BYTES = 256 << 20
RELAYED_BYTES = 32 << 20
#: Under a cap, so that it takes about five seconds.
CAPPED_MBIT = 400.0
REPEATS = 7
SMALL_BYTES = 10_000
ROUND_TRIP_S = 0.1
RELAYED_REPEATS = 3
BLOCK_BYTES = 1 << 20
_HEAD = struct.Struct(">Q?")


async def receiver(files: NodeFiles, ready: Callable[[Any], None]) -> None:
    """Takes transfers, and what comes over plain TLS; ready with (its PeerRef, the TLS port)."""
    listener = socket.create_server(("127.0.0.1", 0))
    context = load_identity(files.identity).server_context()
    threading.Thread(target=_receive_plain, args=(listener, context, files.directory), daemon=True).start()

    async def gate(caller: str, meta: TransferMeta) -> Path:
        return files.directory / f"received-{meta.name}"

    async def arrived(caller: str, meta: TransferMeta, path: Path) -> None:
        await trio.to_thread.run_sync(path.unlink)

    async with open_node(options(files, "hypha-worker")) as node:
        node.transfers.accept(KIND, None, gate, arrived)
        await node.wait_connected()
        seen = node.gateway_changed.count
        while files.gateways and not any("p2p-circuit" in one for one in node.ref().addresses):
            seen = await node.gateway_changed.wait(seen)
        ready((node.ref(), listener.getsockname()[1]))
        await trio.sleep_forever()


def _receive_plain(listener: socket.socket, context: ssl.SSLContext, directory: Path) -> None:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while True:
        raw, _ = listener.accept()
        path = directory / "plain"
        with context.wrap_socket(raw, server_side=True) as sock, path.open("wb", buffering=0) as file:
            size, keep = _HEAD.unpack(sock.recv(_HEAD.size))
            while size:
                block = buffer[: min(size, BLOCK_BYTES)]
                filled = 0
                while filled < len(block):
                    count = sock.recv_into(block[filled:])
                    if not count:
                        raise EOFError("the sender left")
                    filled += count
                if keep:
                    file.write(block)
                size -= filled
            sock.sendall(b"k")
        path.unlink()


def send_plain(path: Path, context: ssl.SSLContext, port: int, keep: bool) -> float:
    """Seconds until the receiver has all of ``path``, and has written it if it is to ``keep`` it."""
    started = time.perf_counter()
    raw = socket.create_connection(("127.0.0.1", port))
    with context.wrap_socket(raw) as sock, path.open("rb") as file:
        sock.sendall(_HEAD.pack(path.stat().st_size, keep))
        while block := file.read(BLOCK_BYTES):
            sock.sendall(block)
        sock.recv(1)
    return time.perf_counter() - started


async def send_bulk(node: Node, peer: PeerRef, path: Path, meta: TransferMeta) -> float:
    """Seconds until the receiver has verified and acknowledged it."""
    started = time.perf_counter()
    await node.transfers.send(peer, path, meta)
    return time.perf_counter() - started


async def direct(report: Report, pki: Pki, directory: Path) -> None:
    """Both ways over loopback."""
    path = _random_file(directory, SIZE_BYTES)
    files = NodeFiles(pki.files("sender", (SENDER,)))
    there = NodeFiles(pki.files("receiver", (RECEIVER,)), directory=directory)
    with child(receiver, there) as (peer, port):
        async with open_node(options(files, "hypha-data")) as node:
            context = load_identity(files.identity).client_context()
            meta = await meta_of(path, KIND, "payload")
            bulk, plain, dropped = [], [], []
            for turn in range(REPEATS + 1):
                written = await trio.to_thread.run_sync(send_plain, path, context, port, True)
                sent = await send_bulk(node, peer, path, meta)
                thrown = await trio.to_thread.run_sync(send_plain, path, context, port, False)
                if turn:  # the first is to warm up
                    plain.append(written)
                    bulk.append(sent)
                    dropped.append(thrown)
    megabytes = SIZE_BYTES / 1e6
    report.add(
        Row(
            name=f"direct, {megabytes:.0f} MB",
            value=megabytes / statistics.median(bulk),
            unit="MB/s",
            reference=megabytes / statistics.median(plain),
            bound=Bound(">=", 0.7),
            note=f"median of {REPEATS}; with BLAKE3, against plain TLS and a file, neither synced to disk",
        )
    )
    report.add(
        Row(
            name="the same, against sockets alone",
            value=megabytes / statistics.median(bulk),
            unit="MB/s",
            reference=megabytes / statistics.median(dropped),
            note="what arrives over plain TLS is thrown away",
        )
    )


async def provider(files: NodeFiles, ready: Callable[[Any], None]) -> None:
    """Serves a small file; ready with (its PeerID, its address). It cannot dial whoever asks."""
    path = files.directory / "small"
    path.write_bytes(os.urandom(SMALL_BYTES))
    meta = await meta_of(path, KIND, "set/0")

    async def provide(caller: str, request: PullFile) -> tuple[Path, TransferMeta]:
        return path, meta

    async with open_node(options(files, "hypha-data")) as node:
        node.transfers.serve(KIND, provide)
        ready((node.peer_id, node.listen_addresses()[0], meta))
        await trio.sleep_forever()


async def asked_for(report: Report, pki: Pki, directory: Path) -> None:
    """How long the first byte of a file takes that is asked for over a long way."""
    files = NodeFiles(pki.files("puller", (RECEIVER,)))
    there = NodeFiles(pki.files("provider", (SENDER,)), relayed=True, directory=directory)
    with child(provider, there) as (peer, address, meta):
        async with (
            proxy_to(*host_and_port(address), delay_s=ROUND_TRIP_S / 2) as proxy,
            open_node(options(files, "hypha-worker")) as node,
        ):
            ref = PeerRef(peer=peer, addresses=(f"/ip4/127.0.0.1/tcp/{proxy.port}",))
            await node.connect(ref)

            async def first_byte_s(number: int) -> float:
                before, began = node.transfers.tally.received, time.perf_counter()
                first = 0.0

                async def watch() -> None:
                    nonlocal first
                    # nobody is told of single bytes
                    while node.transfers.tally.received == before:  # noqa: ASYNC110
                        await trio.sleep(0.001)
                    first = time.perf_counter() - began

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch)
                    request, got = PullFile(kind=KIND, name=meta.name), directory / f"small-{number}"
                    await node.transfers.pull(ref, request, got, meta, 1 << 30)
                return first

            fresh = await first_byte_s(0)
            kept = [await first_byte_s(number) for number in range(1, REPEATS + 1)]
    note = f"{ROUND_TRIP_S * 1000:.0f} ms to the provider and back; median of {REPEATS}"
    value = 1000 * statistics.median(kept)
    name = "first byte of a file asked for, on an open connection"
    report.add(Row(name=name, value=value, unit="ms", bound=Bound("<=", 250.0), note=note))
    report.add(
        Row(
            name="the same, against a connection made for it",
            value=value,
            unit="ms",
            reference=1000 * fresh,
            bound=Bound("<=", 0.6),
            note="what kept connections save",
        )
    )


def processor_s(work: Callable[[], object]) -> float:
    """What ``work`` takes of the processor, in all threads: the best of a few."""
    taken = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def sealed_against_tls(report: Report, pki: Pki) -> None:
    """What the bytes of a file cost both ends, sealed beside TLS and through it."""
    identity = load_identity(pki.files("both", (RECEIVER,)))
    block = os.urandom(BLOCK_BYTES)
    count = SIZE_BYTES // 4 // BLOCK_BYTES

    def fill(read: Callable[[memoryview], int], view: memoryview) -> None:
        while view:
            view = view[read(view) :]

    def tls() -> None:
        def serve() -> None:
            with identity.server_context().wrap_socket(far, server_side=True) as sock:
                for _ in range(count):
                    fill(sock.recv_into, memoryview(buffer))

        near, far = socket.socketpair()
        buffer = bytearray(BLOCK_BYTES)
        thread = threading.Thread(target=serve)
        thread.start()
        with identity.client_context().wrap_socket(near) as sock:
            for _ in range(count):
                sock.sendall(block)
            thread.join()

    def sealed() -> None:
        def serve() -> None:
            opener = Opener(key)
            for _ in range(count):
                fill(far.recv_into, memoryview(buffer))
                opener.open(memoryview(buffer)[LENGTH_BYTES:])

        near, far = socket.socketpair()
        key = new_key()
        buffer = bytearray(LENGTH_BYTES + BLOCK_BYTES + TAG_BYTES)
        thread = threading.Thread(target=serve)
        sealer = Sealer(key)
        with near, far:
            thread.start()
            for _ in range(count):
                near.sendall(sealer.seal(memoryview(block)))
            thread.join()

    megabytes = count * BLOCK_BYTES / 1e6
    report.add(
        Row(
            name="processor time of sealed blocks, against TLS",
            value=1e6 * processor_s(sealed) / megabytes,
            unit="us/MB",
            reference=1e6 * processor_s(tls) / megabytes,
            bound=Bound("<=", 0.8),
            note="both ends over a socket pair, in one process",
        )
    )


def two_hashes(report: Report) -> None:
    """What the second hash, for files that are checked for damage only, saves."""
    block = os.urandom(BLOCK_BYTES)
    count = SIZE_BYTES // 4 // BLOCK_BYTES

    def hashed(make: Callable[[], StreamHash]) -> None:
        hasher = make()
        for _ in range(count):
            hasher.update(block)
        hasher.hexdigest()

    megabytes = count * BLOCK_BYTES / 1e6
    report.add(
        Row(
            name="processor time of XXH3, against BLAKE3",
            value=1e6 * processor_s(lambda: hashed(quick_hasher)) / megabytes,
            unit="us/MB",
            reference=1e6 * processor_s(lambda: hashed(strong_hasher)) / megabytes,
            bound=Bound("<=", 0.25),
            note="updates and theta against all other files",
        )
    )


async def capped(report: Report, pki: Pki, directory: Path) -> None:
    """With a cap on what the sender sends, and on what the receiver receives; two files at once."""
    path = _random_file(directory, SIZE_BYTES // 2)
    limits = {
        "upload": LimitsConfig(upload_mbit=CAPPED_MBIT),
        "download": LimitsConfig(download_mbit=CAPPED_MBIT),
    }
    for direction, limit in limits.items():
        files = NodeFiles(pki.files("sender", (SENDER,)))
        there = NodeFiles(pki.files("receiver", (RECEIVER,)), directory=directory)
        if direction == "download":
            there = replace(there, limits=limit)
        else:
            files = replace(files, limits=limit)
        with child(receiver, there) as (peer, _):
            async with open_node(options(files, "hypha-data")) as node:
                metas = [await meta_of(path, KIND, name) for name in ("one", "another")]
                began = time.perf_counter()
                async with trio.open_nursery() as nursery:
                    for meta in metas:
                        nursery.start_soon(send_bulk, node, peer, path, meta)
                took_s = time.perf_counter() - began
        rate = 2 * path.stat().st_size * 8 / 1e6 / took_s
        for bound in (Bound(">=", 0.95), Bound("<=", 1.05)):
            report.add(
                Row(
                    name=f"{direction} under its cap",
                    value=rate,
                    unit="Mbit/s",
                    reference=CAPPED_MBIT,
                    bound=bound,
                    note="two files at once, from the first offer to the last acknowledgement",
                )
            )


async def relayed(report: Report, pki: Pki, directory: Path) -> None:
    """Through a gateway's circuit."""
    path = _random_file(directory, RELAYED_BYTES)
    with child(gateway, NodeFiles(pki.files("gateway", ("gateway",)))) as address:
        files = NodeFiles(pki.files("sender", (SENDER,)), (address,), relayed=True)
        there = NodeFiles(pki.files("receiver", (RECEIVER,)), (address,), relayed=True, directory=directory)
        with child(receiver, there) as (peer, _):
            async with open_node(options(files, "hypha-data")) as node:
                await node.wait_connected()
                meta = await meta_of(path, KIND, "payload")
                taken = [await send_bulk(node, peer, path, meta) for _ in range(RELAYED_REPEATS)]
                if any(one.kind != "relayed" for one in node.connections() if one.peer == peer.peer):
                    raise RuntimeError("the relayed measurement was not relayed")
    megabytes = RELAYED_BYTES / 1e6
    report.add(
        Row(
            name=f"relayed, {megabytes:.0f} MB",
            value=megabytes / statistics.median(taken),
            unit="MB/s",
            note=f"median of {RELAYED_REPEATS}; TLS end to end inside a circuit",
        )
    )


def _random_file(directory: Path, size_bytes: int) -> Path:
    path = directory / "payload"
    with path.open("wb") as file:
        for _ in range(size_bytes // BLOCK_BYTES):
            file.write(os.urandom(BLOCK_BYTES))
    return path


def main() -> int:
    """Measure; returns the exit code."""
    report = Report("bulk")
    with tempfile.TemporaryDirectory(prefix="hypha-bench-") as name:
        directory = Path(name)
        pki = Pki(directory / "pki")
        trio.run(asked_for, report, pki, directory)
        sealed_against_tls(report, pki)
        two_hashes(report)
        trio.run(direct, report, pki, directory)
        trio.run(capped, report, pki, directory)
        trio.run(relayed, report, pki, directory)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
